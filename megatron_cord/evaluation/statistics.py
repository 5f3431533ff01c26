"""How sure an accuracy, a gap or a difference is: paired bootstrap and McNemar's test.

    gap        = text accuracy - audio accuracy
    gap closed = 1 - (text - audio after) / (text - audio before),   text: the accuracy of the original model

Intervals come from a paired bootstrap: whole questions are drawn, with all that was answered to each, so that the accuracies vary together as
they would on another set of questions. As answers are right or wrong, drawing n questions with replacement is one draw from a multinomial over
the patterns of right and wrong. It simplifies: percentile intervals, and nothing about other seeds of a training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A share with its standard error and 95 % interval; these are None where nothing is known of single questions."""

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None


def estimate(value: float, draws: np.ndarray | None) -> Estimate:
    """The value with what bootstrap draws [RESAMPLES] of it say; without any, alone."""
    if draws is None:
        return Estimate(value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(draws.std()), float(low), float(high))


def paired_draws(outcomes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Accuracies over questions drawn with replacement.

    Args:
        outcomes: bool [questions, K], right or wrong in each of K ways that a question was answered.
        seed: of the draws.

    Returns:
        float64 [RESAMPLES, K].
    """
    kinds, counts = np.unique(outcomes, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(outcomes), counts / len(outcomes), size=RESAMPLES) / len(
        outcomes
    )
    return drawn @ kinds


def gap_closed(text: float, audio_before: float, audio_after: float) -> float | None:
    """The share of the gap that training closed; None if there was none. Negative if it widened."""
    return None if text <= audio_before else 1.0 - (text - audio_after) / (text - audio_before)


def gap_closed_draws(text: np.ndarray, audio_before: np.ndarray, audio_after: np.ndarray) -> np.ndarray | None:
    """The same for draws; None where so many of them have no gap that the ratio is mostly noise, and so would be its interval."""
    has_gap = text > audio_before
    if has_gap.mean() <= 0.975:
        return None
    return 1.0 - (text - audio_after)[has_gap] / (text - audio_before)[has_gap]


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of equal accuracies, from the questions that only one of the two answers right (exact binomial, McNemar 1947).

    Args:
        first, second: bool [questions], of the same questions.
    """
    gained, lost = int(np.sum(~first & second)), int(np.sum(first & ~second))
    differing = gained + lost
    if differing == 0:
        return 1.0
    logs = [
        math.lgamma(differing + 1) - math.lgamma(k + 1) - math.lgamma(differing - k + 1)
        for k in range(min(gained, lost) + 1)
    ]
    return min(1.0, 2.0 * sum(math.exp(value - differing * math.log(2.0)) for value in logs))
