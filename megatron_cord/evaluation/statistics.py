"""Uncertainty of accuracies, gaps and differences, over questions and over seeds.

    gap        = text accuracy - audio accuracy
    gap closed = 1 - (text - audio after) / (text - audio before),   text: the accuracy of the original model

Over questions: a paired bootstrap. Whole questions are drawn, with all that was answered to each, so that the
accuracies vary together as they would on another set of questions. As answers are right or wrong, drawing n questions
with replacement is one draw from a multinomial over the patterns of right and wrong. McNemar's test compares two models
on the same questions. Neither covers other seeds of a training.

Over seeds: a seed stands for a whole training. Student's 95 % intervals take the seeds' values for draws from one
normal distribution; with three seeds they are wide.

It simplifies: percentile intervals for the bootstrap, and no correction for many comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

RESAMPLES = 10_000

# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom; beyond, the expansion below is good to 1e-3.
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A share with its standard error and 95 % interval; these are None where single questions are not known."""

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` values and its 95 % interval, which is None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class SignTest:
    """Questions that only one of two models has right; ``p`` of so uneven a split if neither were better, two-sided."""

    first: int
    second: int
    p: float


def gap_closed(text: float, audio_before: float, audio_after: float) -> float | None:
    """Return the share of the gap that training closed; None if there was none. Negative if it widened."""
    return None if text <= audio_before else 1.0 - (text - audio_after) / (text - audio_before)


def why_no_gap(text: float, audio: float) -> str:
    """Say why there was no gap between these accuracies before training."""
    if max(text, audio) == 0:
        return "no answer was right, read or heard"
    return "hearing was as good as reading" if text == audio else "hearing was better than reading"


def standard_error(accuracy: float, samples: int) -> float:
    """Return the standard error of an accuracy over independent samples (binomial)."""
    return math.sqrt(accuracy * (1.0 - accuracy) / samples) if samples else 0.0


def estimate(value: float, draws: np.ndarray | None) -> Estimate:
    """Return the value with the spread of its bootstrap draws [RESAMPLES]; without any, alone."""
    if draws is None:
        return Estimate(value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(draws.std()), float(low), float(high))


def paired_draws(outcomes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw accuracies over questions taken with replacement.

    Args:
        outcomes: bool [questions, K], right or wrong in each of K ways that a question was answered; or float64, parts
            of a point.
        seed: of the draws.

    Returns:
        float64 [RESAMPLES, K].
    """
    patterns, counts = np.unique(outcomes, axis=0, return_counts=True)
    questions = len(outcomes)
    drawn = np.random.default_rng(seed).multinomial(questions, counts / questions, size=RESAMPLES) / questions
    accuracies: np.ndarray = drawn @ patterns
    return accuracies


def gap_closed_draws(text: np.ndarray, audio_before: np.ndarray, audio_after: np.ndarray) -> np.ndarray | None:
    """Return `gap_closed` of draws; None where more than 2.5 % have no gap, as the ratio is then mostly noise."""
    has_gap = text > audio_before
    if has_gap.mean() <= 0.975:
        return None
    closed: np.ndarray = 1.0 - (text - audio_after)[has_gap] / (text - audio_before)[has_gap]
    return closed


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p-value of equal accuracies (exact, McNemar 1947).

    Only questions that one of the two alone has right count; of parts of a point those in which one has more.

    Args:
        first: bool or float [questions], whether the first model is right, or how much of a point it has.
        second: the same of the second model.
    """
    gained, lost = int(np.sum(second > first)), int(np.sum(first > second))
    differing = gained + lost
    if differing == 0:
        return 1.0
    logs = [
        math.lgamma(differing + 1) - math.lgamma(k + 1) - math.lgamma(differing - k + 1)
        for k in range(min(gained, lost) + 1)
    ]
    return min(1.0, 2.0 * sum(math.exp(value - differing * math.log(2.0)) for value in logs))


def sign_test(pairs: Sequence[tuple[bool, bool]]) -> SignTest:
    """Count and test pairs (first is right, second is right), of which equal ones count for nothing."""
    first, second = np.array(pairs, dtype=bool).reshape(-1, 2).T
    return SignTest(int(np.sum(first & ~second)), int(np.sum(second & ~first)), mcnemar(first, second))


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and its Student interval. Raises ValueError without values."""
    if not values:
        raise ValueError("no values to take the mean of")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Mean(mean, None, None, 1)
    half = student_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Mean(mean, mean - half, mean + half, n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Mean | None:
    """Return the mean of first − second over the seeds that both have; None if there is none."""
    shared = [first[seed] - second[seed] for seed in first if seed in second]
    return mean_of(shared) if shared else None


def student_quantile(degrees: int) -> float:
    """Return the t with 2.5 % of Student's distribution above it; from 10 degrees of freedom on by Cornish-Fisher."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    z = _NORMAL_QUANTILE
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
