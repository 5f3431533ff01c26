"""Shuffling that stays the same: on every machine, for every number of ranks, in every later version of numpy."""

from __future__ import annotations

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
