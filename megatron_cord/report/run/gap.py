"""The audio-text gap of a run before and after training, with the intervals of `evaluation.statistics`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cord.evaluation.statistics import Estimate, estimate, gap_closed, gap_closed_draws, paired_draws
from megatron_cord.report.run.contents import Evaluation


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


def measure_gap(before: Evaluation, after: Evaluation) -> Gap:
    """Compare two evaluations, with intervals where they have the same samples."""
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
    estimates = {name: estimate(value, draws.get(name)) for name, value in values.items()}
    return Gap(
        samples=after.samples, closed=None if closed is None else estimate(closed, draws.get("closed")), **estimates
    )


def _bootstrap(before: Evaluation, after: Evaluation) -> dict[str, np.ndarray]:
    """Return draws [RESAMPLES] of each quantity; empty where the samples of the evaluations cannot be paired."""
    earlier = {answer.id: answer for answer in before.answers}
    later = {answer.id: answer for answer in after.answers}
    if not later or earlier.keys() != later.keys() or len(later) != after.samples or len(earlier) != before.samples:
        return {}
    outcomes = np.array(
        [[e.text_correct, later[i].text_correct, e.audio_correct, later[i].audio_correct] for i, e in earlier.items()]
    )
    text, text_after, audio, audio_after = paired_draws(outcomes).T
    draws = {"text_before": text, "text_after": text_after, "audio_before": audio, "audio_after": audio_after}
    draws |= {"before": text - audio, "after": text - audio_after}
    closed = gap_closed_draws(text, audio, audio_after)
    return draws if closed is None else draws | {"closed": closed}
