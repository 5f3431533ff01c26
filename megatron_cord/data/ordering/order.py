"""Shuffling that stays the same: on every machine, for every number of ranks, in every later version of numpy.

A set's samples come in an endless row of epochs, each a shuffle of its own. `EpochOrder` shuffles all samples of a set;
`WindowOrder` shuffles the shards, and the samples of a window of neighbouring shards among each other, so that a set
can be read shard by shard. Both give the sample at any place of the row without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np


def permutation(count: int, *seeds: int) -> np.ndarray:
    """Return a shuffled order of ``range(count)`` that depends on ``seeds`` alone.

    The raw stream of PCG64 is sorted, because numpy guarantees the raw streams of its bit generators for ever, and the
    streams of ``Generator.permutation`` only within a version.

    Args:
        count: how many items.
        seeds: non-negative integers, for example (seed, epoch).

    Returns:
        int64 [count].
    """
    keys = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(keys, kind="stable")


class Order(Protocol):
    """The row of a set: which of its samples comes at which place."""

    def at(self, place: int) -> int:
        """Return the number in the set of the sample at a place of the row, from 0."""
        ...

    def shards_near(self, place: int) -> Sequence[int]:
        """Return the shards that are read at a place and soon after it, in the order of their need."""
        ...


class EpochOrder:
    """All samples, shuffled anew each epoch.

    Args:
        count: of samples.
        seeds: of the shuffles, before the epoch's number.
        shuffle: False keeps the set's order.
    """

    def __init__(self, count: int, seeds: Sequence[int], *, shuffle: bool = True) -> None:
        self._count, self._seeds, self._shuffle = count, tuple(seeds), shuffle
        self._order = lru_cache(maxsize=2)(self._draw)

    def at(self, place: int) -> int:
        """Return the number in the set of the sample at a place of the row, from 0."""
        epoch, offset = divmod(place, self._count)
        return int(self._order(epoch)[offset])

    def shards_near(self, place: int) -> Sequence[int]:
        """Return none: any shard may be read next."""
        return ()

    def _draw(self, epoch: int) -> np.ndarray:
        """int64 [count]."""
        return permutation(self._count, *self._seeds, epoch) if self._shuffle else np.arange(self._count)


class WindowOrder:
    """Shards shuffled anew each epoch, and samples shuffled within windows of shards.

    Args:
        counts: samples of each shard, int64 [shards]; some of them may be 0.
        window: shards whose samples are shuffled among each other.
        seeds: of the shuffles, before the epoch's number.
        shuffle: False keeps the set's order.
    """

    def __init__(self, counts: Sequence[int], window: int, seeds: Sequence[int], *, shuffle: bool = True) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)])  # number in the set of each shard's first sample
        self._count = int(self._firsts[-1])
        self._window, self._seeds, self._shuffle = window, tuple(seeds), shuffle
        self._shards = lru_cache(maxsize=2)(self._draw_shards)
        self._samples = lru_cache(maxsize=2)(self._draw_samples)

    def at(self, place: int) -> int:
        """Return the number in the set of the sample at a place of the row, from 0."""
        epoch, offset = divmod(place, self._count)
        window, inside = self._window_of(epoch, offset)
        return int(self._samples(epoch, window)[inside])

    def shards_near(self, place: int) -> Sequence[int]:
        """Return the shards of the place's window and of the next, in their order."""
        epoch, offset = divmod(place, self._count)
        window, _ = self._window_of(epoch, offset)
        order, start = self._shards(epoch)[0], window * self._window
        near = [int(shard) for shard in order[start : start + 2 * self._window]]
        if start + self._window >= len(order):
            near += [int(shard) for shard in self._shards(epoch + 1)[0][: self._window]]
        return list(dict.fromkeys(near))

    def _window_of(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return the window that the epoch's sample at an offset belongs to, and its place in it."""
        _, starts = self._shards(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return window, offset - int(starts[window])

    def _draw_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the shards, int64 [shards], and the offsets at which windows begin, int64 [windows]."""
        shards = len(self._counts)
        order = permutation(shards, *self._seeds, epoch) if self._shuffle else np.arange(shards)
        before = np.concatenate([[0], np.cumsum(self._counts[order])])
        return order, before[: -1 : self._window]

    def _draw_samples(self, epoch: int, window: int) -> np.ndarray:
        """Return the samples of a window in their order, int64 [samples of the window]."""
        start = window * self._window
        shards = self._shards(epoch)[0][start : start + self._window]
        samples = np.concatenate([np.arange(self._firsts[shard], self._firsts[shard + 1]) for shard in shards])
        if not self._shuffle:
            return samples
        shuffled: np.ndarray = samples[permutation(len(samples), *self._seeds, epoch, 1 + window)]
        return shuffled
