"""Sets in memory, for tests of what is done with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cord.data.ordering.damage import DamageLog
from megatron_cord.data.ordering.order import EpochOrder
from megatron_cord.data.ordering.row import Phase, Row
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError


class Listed:
    """A set of these samples, of which some cannot be read; notes what is expected."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.broken, self.expected = list(samples), set[int](), list[int]()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise CordError(f"sample {self.samples[index].id} is broken")
        return self.samples[index]

    def without_audio(self, index: int) -> Sample:
        return self[index]

    def id_of(self, index: int) -> str:
        return self.samples[index].id

    def expect(self, shards: Sequence[int]) -> None:
        self.expected.extend(shards)

    def close(self) -> None:
        pass


def row_of(samples: Sequence[Sample] | Listed, seed: int = 1, *, shuffle: bool = True, max_skipped: float = 0.0) -> Row:
    """Return the row of one set."""
    one = samples if isinstance(samples, Listed) else Listed(samples)
    return rows({"": one}, {"": 1.0}, seed, shuffle=shuffle, max_skipped=max_skipped)


def rows(
    sets: Mapping[str, Listed],
    weights: Mapping[str, float],
    seed: int = 1,
    *,
    shuffle: bool = True,
    max_skipped: float = 0.0,
    phase: Phase | None = None,
    damage: DamageLog | None = None,
) -> Row:
    """Return the row of several sets."""
    sizes = {name: len(each) for name, each in sets.items()}
    orders = {
        name: EpochOrder(size, (seed, len(name)) if name else (seed,), shuffle=shuffle) for name, size in sizes.items()
    }
    damage = damage or DamageLog(sizes, dict.fromkeys(sizes, 0), max_skipped)
    return Row(sets, orders, phase or Phase(weights), damage)
