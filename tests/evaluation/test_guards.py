"""Guards: how far an accuracy has dropped, with its interval, and baselines that are of no use."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EvaluationConfig, GuardConfig, SetConfig
from megatron_cord.evaluation.guards import Drop, baseline_file, measure_drop, read_baseline
from megatron_cord.evaluation.questions import Question

QUESTIONS = [Question(f"q{i}", str(i), f"what is {i}") for i in range(10)]


def write_baseline(path: Path, right: int, questions: list[Question] = QUESTIONS, **changed: Any) -> Path:
    """Write a result in which the first questions are right, and return its file."""
    rows = [
        {"id": q.id, "question": q.asked, "answer": q.answer, "text_correct": i < right} | changed
        for i, q in enumerate(questions)
    ]
    path.write_text(json.dumps({"answers": rows}))
    return path


def test_the_drop_and_its_interval() -> None:
    """Catches a sign that is turned, unpaired draws, questions of one evaluation alone, and a part of a point.

    The oracle draws the questions themselves, all 4^4 times that four can be drawn from four.
    """
    before, now = (
        {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.0, "old": 1.0},
        {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "new": 1.0},
    )
    drop = measure_drop(before, now)
    assert (drop.accuracy, drop.before, drop.drop, drop.samples) == (0.25, 0.625, 0.375, 4)
    lost = np.array([0.0, 1.0, 0.5, 0.0])
    drawn = [lost[list(chosen)].mean() for chosen in itertools.product(range(4), repeat=4)]
    assert (drop.low, drop.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.13)
    assert drop.low < 0.1 and drop.high > 0.7
    same = measure_drop(before, before)
    assert (same.drop, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(CordError, match="no question in common"):
        measure_drop({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize(("decides", "limit"), [("low", 0.1), ("drop", 0.2), ("high", 0.3)])
def test_what_decides(decides: Any, limit: float) -> None:
    """Catches another bound than the one that was asked for, and a drop that is just allowed."""
    drop = Drop(accuracy=0.6, before=0.8, drop=0.2, low=0.1, high=0.3, samples=50)
    assert not drop.exceeds(GuardConfig("heldout", limit, decides=decides))
    assert drop.exceeds(GuardConfig("heldout", limit - 0.01, decides=decides))


def test_baselines_that_are_of_no_use(tmp_path: Path) -> None:
    """Catches other questions under the same ids, a part of the set, the other view, a limit that nothing exceeds."""
    guard = GuardConfig("sums", 0.2)
    good = write_baseline(tmp_path / "sums.json", 6)
    assert read_baseline(good, guard, QUESTIONS, 0.02) == {f"q{i}": float(i < 6) for i in range(10)}
    assert baseline_file(GuardConfig("sums", 0.2, baseline=str(tmp_path)), Path()) == good
    cases = [
        (
            write_baseline(tmp_path / "other.json", 6, answer="7"),
            guard,
            "q0 is another question, or has another answer",
        ),
        (write_baseline(tmp_path / "part.json", 4, QUESTIONS[:5]), guard, "answers to 5 of the 10 questions"),
        (good, GuardConfig("sums", 0.2, view="hear"), r"no answers from audio \(view hear\)"),
        (
            write_baseline(tmp_path / "none.json", 0),
            guard,
            r"accuracy is 0\.0% on 10 .*no drop could exceed max_drop=0\.2",
        ),
        (good, GuardConfig("sums", 0.5), r"no drop could exceed max_drop=0\.5 \(decides=low\)"),
        (tmp_path / "gone.json", guard, "cannot be read"),
    ]
    (tmp_path / "empty.json").write_text("{}")
    cases.append((tmp_path / "empty.json", guard, "is no result of an evaluation"))
    questions = [Question(q.id, q.answer, q.text, lambda: []) for q in QUESTIONS]
    for path, config, message in cases:
        with pytest.raises(CordError, match=message):
            read_baseline(path, config, questions, 0.02)
    assert read_baseline(good, GuardConfig("sums", 0.5, decides="drop"), QUESTIONS, 0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"guards": {"text": GuardConfig("other", 0.1)}},
            r"guards\.text\.set=other is none of the run's sets: heldout",
        ),
        ({"guards": {"a/b": GuardConfig("heldout", 0.1)}}, "becomes a metric's name"),
    ],
)
def test_guards_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    """Catches a guard of a set that the run lacks, and one refused where the first and last evaluation are all."""
    with pytest.raises(CordError, match=message):
        EvaluationConfig(**({"sets": {}} | settings))
    EvaluationConfig(sets={"other": SetConfig("f.jsonl")}, guards={"text": GuardConfig("other", 0.1)}, interval=0)
    for limits in ({"max_drop": 1.0}, {"max_drop": -0.1}, {"max_drop": 0.1, "patience": 0}):
        with pytest.raises(CordError):
            GuardConfig("heldout", **limits)  # type: ignore[arg-type]
