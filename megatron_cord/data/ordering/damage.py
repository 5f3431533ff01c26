"""What turns out to be damaged while a run goes on: the same on all ranks, counted, and within a bound.

What a rank cannot read is made known where all ranks meet (`SampleLoader.batch`), so that all know the same damage at
the same step, whoever found it. It stands in every checkpoint: a resumed run leaves out the same, also where a shard
has come back meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_cord.errors import CordError


class DamageLimitError(CordError):
    """More is damaged than may be left out; raised on all ranks at the same step."""


class DamagedError(CordError):
    """Samples that cannot be used.

    Args:
        message: what is wrong; names the shard or the sample.
        first: the number in its set of the first sample.
        last: the number behind the last.
        fatal: the run must not go on without them, whatever may be skipped.
    """

    def __init__(self, message: str, first: int, last: int, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.first, self.last, self.fatal = first, last, fatal


@dataclass(frozen=True)
class Damage:
    """Samples of a set that cannot be used: one, or those of a shard.

    Attributes:
        set: the set's name.
        first: the number of the first in the set.
        last: the number behind the last.
        message: what is wrong; names the shard or the sample.
        fatal: the run must not go on without them, whatever may be skipped.
    """

    set: str
    first: int
    last: int
    message: str
    fatal: bool = False

    @property
    def samples(self) -> int:
        """How many they are."""
        return self.last - self.first

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Return what `to_json` made."""
        return cls(**plain)


class Ranges:
    """Disjoint ranges of numbers, ascending."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number < self._lasts[at]

    def __len__(self) -> int:
        return sum(last - first for first, last in self.pairs())

    def add(self, first: int, last: int) -> None:
        """Add the numbers from first to before last; what they overlap or touch becomes one range with them."""
        start = bisect_right(self._firsts, first)
        if start and self._lasts[start - 1] >= first:
            start -= 1
            first = self._firsts[start]
        end = bisect_right(self._firsts, last)
        if end > start:
            last = max(last, self._lasts[end - 1])
        self._firsts[start:end], self._lasts[start:end] = [first], [last]

    def pairs(self) -> list[tuple[int, int]]:
        """Return (first, behind the last) of each."""
        return list(zip(self._firsts, self._lasts, strict=True))


class DamageLog:
    """The damage that is known.

    Args:
        sizes: samples of each set, those included that were left out when it was opened.
        skipped: how many that were.
        max_skipped: the largest share of a set that may be left out.
        before: what `state` returned to the run that goes on; what it has of other sets is kept for when they are back.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        skipped: Mapping[str, int],
        max_skipped: float,
        before: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self._sizes, self._skipped, self._max_skipped = dict(sizes), dict(skipped), max_skipped
        known = dict.fromkeys(sizes, ()) | dict(before or {})
        self._known = {name: Ranges(ranges) for name, ranges in known.items()}
        self.found: list[tuple[int, Damage]] = []  #: by this process: step, counted from 0, and damage

    def covers(self, name: str, number: int) -> bool:
        """Return whether a sample of a set is known to be damaged."""
        return number in self._known[name]

    def count(self, name: str) -> int:
        """Return how many samples of a set are known to be damaged, beside those left out when it was opened."""
        return len(self._known[name])

    def state(self) -> dict[str, list[tuple[int, int]]]:
        """Return all that is known, for a checkpoint."""
        return {name: pairs for name, ranges in self._known.items() if (pairs := ranges.pairs())}

    def learn(self, damages: Sequence[Damage], step: int) -> None:
        """Add what the ranks have found at a step; they pass the same.

        Raises:
            DamageLimitError: it is more than may be skipped.
        """
        for damage in damages:
            if damage.fatal or not self._max_skipped:
                raise DamageLimitError(damage.message)
            before = self.count(damage.set)
            self._known[damage.set].add(damage.first, damage.last)
            if self.count(damage.set) > before:  # another rank may have found it, too
                self.found.append((step, damage))
            lost, size = self.count(damage.set) + self._skipped[damage.set], self._sizes[damage.set]
            if lost > self._max_skipped * size:
                of = f" of set {damage.set}" if damage.set else ""
                raise DamageLimitError(
                    f"{lost} of {size} samples{of} cannot be used, more than data.max_skipped={self._max_skipped:g} "
                    f"allows; the last: {damage.message}"
                )
