"""The evaluations of runs side by side, with 95 % intervals over the questions.

The last evaluation of each run counts. Runs that answered the same questions are compared with the first run question
by question, which is sharper than two intervals: most of the questions' difficulty cancels out. It says nothing about
other seeds (`cord compare` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.statistics import Estimate, estimate, mcnemar, paired_draws
from megatron_cord.report.run.contents import Evaluation, RunContents
from megatron_cord.report.run.gap import measure_gap
from megatron_cord.report.run.sets import SetResult, read_set_results


@dataclass(frozen=True)
class Difference:
    """An accuracy minus that of the first run on the same questions, and McNemar's p-value."""

    estimate: Estimate
    p: float


@dataclass(frozen=True)
class Result:
    """What a run has reached on its held-out questions; what is not known is None.

    Attributes:
        step: of the last evaluation.
        samples: its questions.
        text_before, audio_before: accuracies before training; None with one evaluation.
        text, audio: accuracies at `step`.
        closed: share of the gap closed.
        difference: of `audio` from the first run's; None for the first, and where the questions differ.
    """

    step: int | None = None
    samples: int = 0
    text_before: Estimate | None = None
    text: Estimate | None = None
    audio_before: Estimate | None = None
    audio: Estimate | None = None
    closed: Estimate | None = None
    difference: Difference | None = None


def results(runs: Sequence[RunContents]) -> list[Result]:
    """Return the result of each run."""
    last = [run.outcome for run in runs]
    return [
        _result(run, None if number == 0 else difference(last[0], after)) if after else Result()
        for number, (run, after) in enumerate(zip(runs, last, strict=True))
    ]


def difference(first: Evaluation | None, other: Evaluation | None) -> Difference | None:
    """Return the audio accuracy of `other` minus that of `first`; None where they asked different questions."""
    if first is None or other is None:
        return None
    theirs = {answer.id: answer.audio_correct for answer in first.answers}
    ours = {answer.id: answer.audio_correct for answer in other.answers}
    if not ours or theirs.keys() != ours.keys():
        return None
    pairs = np.array([(theirs[name], ours[name]) for name in theirs])
    draws = paired_draws(pairs)
    value = float(pairs[:, 1].mean() - pairs[:, 0].mean())
    return Difference(estimate(value, draws[:, 1] - draws[:, 0]), mcnemar(pairs[:, 0], pairs[:, 1]))


def set_tables(directories: Sequence[Path]) -> Mapping[str, list[SetResult | None]]:
    """Return for each question set beside the held-out one the newest result of each run; None where it has none."""
    found = [read_set_results(directory) for directory in directories]
    names = dict.fromkeys(name for results_of_run in found for name in results_of_run if name != HELDOUT)
    return {name: [results_of_run.get(name) for results_of_run in found] for name in names}


def _result(run: RunContents, against: Difference | None) -> Result:
    before, after = run.evaluations[0], run.outcome or run.evaluations[-1]
    gap = measure_gap(before, after)
    earlier = len(run.evaluations) > 1
    return Result(
        step=after.step,
        samples=after.samples,
        text_before=gap.text_before if earlier else None,
        text=gap.text_after,
        audio_before=gap.audio_before if earlier else None,
        audio=gap.audio_after,
        closed=gap.closed if earlier else None,
        difference=against,
    )
