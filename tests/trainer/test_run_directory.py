"""What the docs say that a run leaves and reads: its report, and the question sets of its evaluations."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import finalize
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.trackers.tags import tag
from tests.tiny_run import overrides
from tests.trainer.runs.test_train import alone


def test_a_run_ends_with_its_report_and_reads_its_sets(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a report that only the quickstart writes, and question sets that training silently leaves out."""
    caplog.set_level(logging.INFO, logger="megatron_cord")
    questions = tmp_path / "sums.jsonl"
    questions.write_text('{"id": "a", "question": "what is one plus two", "answer": "3"}\n')
    run = tmp_path / "run"
    settings = overrides(
        inputs,
        run,
        "train.steps=2",
        "checkpoint.interval=0",
        f"evaluation.sets.sums.path={questions}",
        f"evaluation.sets.spoken={{path: {inputs / 'heldout'}, format: shards}}",
    )
    try:
        train(load_config(RunConfig, None, settings))
    finally:
        finalize()
    page = (run / "report.html").read_text()
    assert "no answer was right, read or heard" in page and "as good as reading" not in page
    assert f"report: {run / 'report.html'}" in caplog.text
    for step in (0, 2):
        found = {
            path.stem: json.loads(path.read_text()) for path in (run / f"evaluations/step_{step:06d}").glob("*.json")
        }
        assert found.keys() == {"heldout", "sums", "spoken"}
        assert found["sums"]["samples"] == 1 and found["spoken"]["samples"] == found["heldout"]["samples"]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert not [name for name in row if tag(name).startswith("other/") and name != "step"], "a metric without a group"
    assert "step 2: sums: text accuracy 0.0%" in caplog.text
    assert "step 2: spoken: text accuracy 0.0%, audio accuracy 0.0%" in caplog.text


def test_a_missing_set_stops_the_run_at_its_start(inputs: Path, tmp_path: Path) -> None:
    """Catches a mistyped path that is noticed after the training, or never."""
    with pytest.raises(CordError, match=r"nowhere\.jsonl"):
        alone(inputs, tmp_path / "run", f"evaluation.sets.sums.path={tmp_path / 'nowhere.jsonl'}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_value_that_no_evaluation_has_stops_the_run_before_its_first_step(inputs: Path, tmp_path: Path) -> None:
    """Catches a set without the value of evaluation.early_stopping that ends the run after steps which are lost."""
    questions = tmp_path / "sums.jsonl"
    questions.write_text('{"id": "a", "question": "what is one plus two", "answer": "3"}\n')
    sets = (f"evaluation.sets.sums.path={questions}", "evaluation.early_stopping.set=sums")
    with pytest.raises(CordError, match=r"metric=audio_accuracy: the set sums has none"):
        alone(inputs, tmp_path / "run", *sets, "train.steps=1", "checkpoint.interval=0")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
