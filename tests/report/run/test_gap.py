"""The gap and its intervals, against a bootstrap that draws sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cord.evaluation.statistics import gap_closed, standard_error
from megatron_cord.report.run.contents import Answer, Evaluation
from megatron_cord.report.run.gap import measure_gap


def evaluation(
    step: int, text: list[bool] | np.ndarray, audio: list[bool] | np.ndarray, prefix: str = ""
) -> Evaluation:
    answers = tuple(
        Answer(f"{prefix}{i}", "q", None, None, "", bool(t), "", bool(a), (), None)
        for i, (t, a) in enumerate(zip(text, audio, strict=True))
    )
    return Evaluation(step, float(np.mean(text)), float(np.mean(audio)), len(text), None, {}, answers)


def test_gap_closed() -> None:
    """Catches the paper's formula turned round, and a division by a gap that is not there."""
    assert gap_closed(0.4047, 0.2073, 0.3620) == pytest.approx(0.7837, abs=1e-4)  # the paper's GSM8K row
    assert gap_closed(0.9, 0.5, 0.4) == pytest.approx(-0.25)
    assert gap_closed(0.9, 0.5, 1.0) == pytest.approx(1.25)
    assert gap_closed(0.9, 0.9, 0.5) is None and gap_closed(0.8, 0.9, 0.9) is None


def test_intervals_match_a_plain_bootstrap() -> None:
    """Catches accuracies drawn independently (too wide intervals), and percentiles of the wrong quantity."""
    rng = np.random.default_rng(3)
    text, audio = rng.random(200) < 0.95, rng.random(200) < 0.4
    after = audio | (rng.random(200) < 0.7)
    gap = measure_gap(evaluation(0, text, audio), evaluation(10, text, after))
    draws = []
    for _ in range(4000):
        chosen = rng.integers(200, size=200)
        t, b, a = text[chosen].mean(), audio[chosen].mean(), after[chosen].mean()
        draws.append((a, t - a, 1 - (t - a) / (t - b)))
    for estimate, column in zip((gap.audio_after, gap.after, gap.closed), np.array(draws).T, strict=True):
        assert estimate is not None and estimate.error is not None
        assert estimate.error == pytest.approx(column.std(), rel=0.06)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(column, [2.5, 97.5])), abs=0.012)
    assert gap.audio_after.error == pytest.approx(standard_error(float(after.mean()), 200), rel=0.05)


def test_gap_is_to_the_original_text_accuracy() -> None:
    """Catches a run that closes its gap by forgetting how to read."""
    right, wrong = [True] * 10, [False] * 10
    gap = measure_gap(evaluation(0, right, wrong), evaluation(10, wrong, wrong))
    assert gap.after.value == 1.0 and gap.closed is not None and gap.closed.value == 0.0


def test_no_interval_without_pairs_or_gap() -> None:
    """Catches an interval from answers that cannot be paired, and one of a ratio to a gap that may not exist."""
    text, audio = [True] * 9 + [False], [True] * 5 + [False] * 5
    gap = measure_gap(evaluation(0, text, audio), evaluation(10, text, text, prefix="other"))
    assert gap.closed is not None and gap.closed.value == 1.0 and gap.closed.low is None and gap.before.error is None
    gap = measure_gap(evaluation(0, text, [*text[1:], True]), evaluation(10, text, text))
    assert gap.closed is None and gap.before.error is not None
    gap = measure_gap(
        evaluation(0, [True, False] * 5 + [True], [False, True] * 5 + [False]), evaluation(10, [True] * 11, [True] * 11)
    )
    assert gap.closed is not None and gap.closed.low is None
