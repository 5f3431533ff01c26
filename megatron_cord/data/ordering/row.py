"""The endless row of samples that a run takes from the beginning: sets in turn, and each set in its own order.

The sample at a position is a function of the seed, the weights of the sets, the position and the known damage, so the
position is all that a run must save while the weights stay. Where they change, the row continues with the new ones, and
each set after the samples that were taken of it: a `Phase` has its first position, and what was taken before.

A damaged sample is replaced by another one of its set: the nearest undamaged one at the same place of an earlier step's
batch, else of a later one's. (A frozen teacher has answered that one for L_seq, too, if the position needs it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol

from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.mixture import Mixture
from megatron_cord.data.ordering.order import Order
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError

_STEPS = 1_000  # before and after, in which another sample is looked for; further away any position will do
_POSITIONS = 1_000_000


class Address(NamedTuple):
    """A sample: the name of its set, "" for a single one, and its number there."""

    set: str
    number: int


class TrainingSet(Protocol):
    """Samples by number, `ShardDataset` for example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def without_audio(self, index: int) -> Sample:
        """Read a sample without its audio."""
        ...

    def id_of(self, index: int) -> str:
        """Return a sample's id."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """Begin to read shards that will be needed soon."""
        ...

    def close(self) -> None:
        """End what `expect` has begun."""
        ...


@dataclass(frozen=True)
class Phase:
    """A stretch of the row with the same weights.

    Attributes:
        weights: of the sets, by name.
        start: the position at which it begins.
        before: samples taken of each set before it.
    """

    weights: Mapping[str, float]
    start: int = 0
    before: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def mixture(self) -> Mixture:
        """Which set each position is of; kept, as it is worked out position by position."""
        return Mixture(self.weights)

    def goes_on(self, samples: int, weights: Mapping[str, float]) -> Phase:
        """Return the phase of a run that goes on after so many samples, with these weights."""
        if Mixture(weights).shares == self.mixture.shares:
            return replace(self, weights=weights)
        return Phase(weights, samples, self.taken(samples))

    def taken(self, samples: int) -> dict[str, int]:
        """Return how many samples of each set are among the first of the row, those of past sets included."""
        counts = self.mixture.counts(samples - self.start)
        return {name: self.before.get(name, 0) + counts.get(name, 0) for name in {**counts, **self.before}}


class Row:
    """Sets, their orders and what is damaged in them, as one row.

    Args:
        sets: by name; a single one is called "".
        orders: of the sets.
        phase: the weights, and where they begin.
        damage: what is known of it.
    """

    def __init__(
        self, sets: Mapping[str, TrainingSet], orders: Mapping[str, Order], phase: Phase, damage: DamageLog
    ) -> None:
        self.sets, self.phase, self.damage = dict(sets), phase, damage
        self._orders = dict(orders)

    def at(self, position: int, batch_size: int) -> Address:
        """Return the sample at a position of the row, or what stands in for it.

        Args:
            position: from 0.
            batch_size: samples a step.

        Raises:
            CordError: its set has no undamaged sample that could stand in.
        """
        wanted = self._planned(position)
        if not self.damage.covers(*wanted):
            return wanted
        if self.damage.count(wanted.set) < len(self.sets[wanted.set]):
            far = _STEPS * batch_size
            others = chain(
                range(position - batch_size, position - far, -batch_size),
                range(position + batch_size, position + far, batch_size),
                range(position + 1, position + _POSITIONS),
            )
            for other in others:
                if other >= self.phase.start:
                    found = self._planned(other)
                    if found.set == wanted.set and not self.damage.covers(*found):
                        return found
        raise CordError(f"data.train{wanted.set and '.' + wanted.set} has no sample left that can be used")

    def read(self, address: Address) -> Sample:
        """Read a sample.

        Raises:
            CordError: it cannot be read; `DamagedError` where that says which other samples are damaged, too.
        """
        return _named(self.sets[address.set][address.number], address)

    def without_audio(self, address: Address) -> Sample:
        """Read a sample without its audio. Raises as `read`."""
        return _named(self.sets[address.set].without_audio(address.number), address)

    def id_of(self, address: Address) -> str:
        """Return the id of a sample as `read` gives it."""
        return _unique(self.sets[address.set].id_of(address.number), address)

    def expect(self, position: int) -> None:
        """Let the sets read ahead: a step's batch is being read that ends before this position."""
        for name, taken in self.phase.taken(position).items():
            if name in self.sets and (shards := self._orders[name].shards_near(taken)):
                self.sets[name].expect(shards)

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each set has been gone through before a position."""
        taken = self.phase.taken(position)
        return {name: taken[name] / len(samples) for name, samples in self.sets.items()}

    def close(self) -> None:
        """End reading ahead."""
        for samples in self.sets.values():
            samples.close()

    def _planned(self, position: int) -> Address:
        """Return what would stand at a position if nothing were damaged."""
        name, number = self.phase.mixture.at(position - self.phase.start)
        return Address(name, self._orders[name].at(self.phase.before.get(name, 0) + number))


def _named(sample: Sample, address: Address) -> Sample:
    return replace(sample, id=_unique(sample.id, address)) if address.set else sample


def _unique(sample_id: str, address: Address) -> str:
    """Return an id that no sample of another set has."""
    return f"{address.set}/{sample_id}" if address.set else sample_id
