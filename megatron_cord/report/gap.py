"""The audio-text gap, and how sure one can be of it.

    gap        = text accuracy - audio accuracy
    gap closed = 1 - (text - audio after) / (text - audio before),   text: the accuracy of the original model

Intervals come from a paired bootstrap: whole samples are drawn, with all that was answered to each, so that the accuracies vary
together as they would on another held-out set. A sample has one of 16 outcomes (text and audio, before and after: right or
wrong), so drawing n samples with replacement is one draw from a multinomial. It simplifies: percentile intervals, and nothing about other
seeds of the training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cord.report.record import Evaluation

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A share with its standard error and 95 % interval; these are None where the evaluations do not list every sample."""

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Gap:
    """The result of a run on ``samples`` held-out questions. ``closed`` is None where there was no gap to close."""

    samples: int
    text_before: Estimate
    text_after: Estimate
    audio_before: Estimate
    audio_after: Estimate
    before: Estimate
    after: Estimate
    closed: Estimate | None


def gap_closed(text: float, audio_before: float, audio_after: float) -> float | None:
    """The share of the gap that training closed; None if there was none. Negative if it widened."""
    return None if text <= audio_before else 1.0 - (text - audio_after) / (text - audio_before)


def standard_error(accuracy: float, samples: int) -> float:
    """Of an accuracy over independent samples (binomial)."""
    return float(np.sqrt(accuracy * (1.0 - accuracy) / samples)) if samples else 0.0


def measure_gap(before: Evaluation, after: Evaluation) -> Gap:
    """Both evaluations together, with intervals when they list the same samples."""
    values = {
        "text_before": before.text_accuracy,
        "text_after": after.text_accuracy,
        "audio_before": before.audio_accuracy,
        "audio_after": after.audio_accuracy,
        "before": before.text_accuracy - before.audio_accuracy,
        "after": before.text_accuracy - after.audio_accuracy,
    }
    closed = gap_closed(before.text_accuracy, before.audio_accuracy, after.audio_accuracy)
    draws = _bootstrap(before, after)
    estimates = {name: _estimate(value, draws.get(name)) for name, value in values.items()}
    return Gap(samples=after.samples, closed=None if closed is None else _estimate(closed, draws.get("closed")), **estimates)


def _bootstrap(before: Evaluation, after: Evaluation) -> dict[str, np.ndarray]:
    """Draws [RESAMPLES] of each quantity; empty when the samples of the two evaluations cannot be paired."""
    earlier = {answer.id: answer for answer in before.answers}
    later = {answer.id: answer for answer in after.answers}
    if not later or earlier.keys() != later.keys() or len(later) != after.samples or len(earlier) != before.samples:
        return {}
    outcomes = np.array([[e.text_correct, later[i].text_correct, e.audio_correct, later[i].audio_correct] for i, e in earlier.items()])
    kinds, counts = np.unique(outcomes, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(outcomes), counts / len(outcomes), size=RESAMPLES) / len(outcomes)
    text, text_after, audio, audio_after = (drawn @ kinds).T
    draws = {"text_before": text, "text_after": text_after, "audio_before": audio, "audio_after": audio_after}
    draws |= {"before": text - audio, "after": text - audio_after}
    has_gap = text > audio
    if has_gap.mean() > 0.975:  # else the ratio is mostly noise, and so would be its interval
        draws["closed"] = 1.0 - (text - audio_after)[has_gap] / (text - audio)[has_gap]
    return draws


def _estimate(value: float, draws: np.ndarray | None) -> Estimate:
    if draws is None:
        return Estimate(value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(draws.std()), float(low), float(high))
