"""What few seeds can say: means with intervals, differences between runs that share a seed, and between answers to the same question.

A seed stands for a whole training, with a warm-up, data order and sampling of its own. Intervals over seeds are Student's, 95 %, and so take the
seeds' values for draws from one normal distribution: with three seeds they are wide, as they should be. The sign test looks at questions instead:
it is sharper, but speaks of these trained models alone, not of other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import numpy as np

from megatron_cord.evaluation.statistics import mcnemar

# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom; beyond, the expansion below is good to 1e-3.
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` values and its 95 % interval, which is None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class SignTest:
    """Questions that only one of two models answered rightly; ``p`` of so uneven a split if neither were better, two-sided."""

    first: int
    second: int
    p: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and Student interval. Raises ValueError without values."""
    if not values:
        raise ValueError("no values to take the mean of")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Mean(mean, None, None, 1)
    half = student_quantile(n - 1) * stdev(values) / sqrt(n)
    return Mean(mean, mean - half, mean + half, n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Mean | None:
    """Mean of first − second over the seeds that both have; None if there is none."""
    shared = [first[seed] - second[seed] for seed in first if seed in second]
    return mean_of(shared) if shared else None


def sign_test(pairs: Sequence[tuple[bool, bool]]) -> SignTest:
    """Over pairs (first is right, second is right); equal pairs count for nothing."""
    first, second = np.array(pairs, dtype=bool).reshape(-1, 2).T
    return SignTest(int(np.sum(first & ~second)), int(np.sum(second & ~first)), mcnemar(first, second))


def student_quantile(degrees: int) -> float:
    """T with 2.5 % of Student's distribution above it (Cornish-Fisher expansion from 10 degrees of freedom on)."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    z = _NORMAL_QUANTILE
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
