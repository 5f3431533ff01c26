"""Runs that are finished before their last step: evaluations that are no better, and time that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_cord.config.loading import load_config
from megatron_cord.data.loader import Batch
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.endings.time_budget import TimeBudget
from megatron_cord.trainer.run import Run
from tests.gloo import run_ranks
from tests.tiny_run import metrics, overrides
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import alone


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def accuracies(run: Path) -> dict[int, float]:
    """Return the audio accuracy of each evaluation after the first step."""
    files = sorted((run / "evaluations").glob("step_*/heldout.json"))[1:]
    return {r["step"]: r["audio_accuracy"] for r in (json.loads(path.read_text()) for path in files)}


STOPPING = (
    "train.steps=6", "evaluation.interval=1", "evaluation.early_stopping.patience=2",
    "evaluation.early_stopping.min_delta=1", "checkpoint.interval=0", "checkpoint.keep=1", "checkpoint.best=true",
)  # fmt: skip
EXPORTING = ("checkpoint.export_interval=2", "checkpoint.export_keep=1")


def test_evaluations_that_are_no_better_end_a_run(inputs: Path, tmp_path: Path) -> None:
    """Catches ranks that end after different steps, a run without its last checkpoint or summary.

    Also the best checkpoint among those that are deleted, and a finished run that trains on when it is started again.
    """
    run = tmp_path / "run"
    status, errors = run_forked(overrides(inputs, run, *STOPPING), tmp_path / "log")
    assert status == 0, errors
    assert "2 evaluations in a row were no better" in errors and "finished after step 3 of 6" in errors
    values = accuracies(run)
    assert list(values) == [1, 2, 3]
    best = max(values, key=lambda step: (values[step], -step))
    record = {"step": best, "set": "heldout", "metric": "audio_accuracy", "value": values[best]}
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == record
    assert names(run / "checkpoints") == ["best.json", *sorted({f"step_{best:06d}", "step_000003"})]
    found = summary(run)
    assert (found["steps"], found["ended_by"], found["best"]) == (3, "early_stopping", record)

    (run / "summary.json").unlink()
    alone(inputs, run, *STOPPING)
    assert summary(run) == found and len(metrics(run)) == 3
    alone(inputs, run, *STOPPING, "evaluation.early_stopping.patience=0")
    assert summary(run)["ended_by"] == "steps" and len(metrics(run)) == 6


@pytest.mark.slow
def test_exports_of_a_run_that_ends_early(inputs: Path, tmp_path: Path) -> None:
    """Catches a run on two ranks without its last export, one that is kept too long, and names that differ."""
    run = tmp_path / "run"
    status, errors = run_forked(overrides(inputs, run, *STOPPING, *EXPORTING), tmp_path / "log")
    assert status == 0, errors
    assert names(run / "exports") == ["step_000003"]
    exported = load_file(run / "exports" / "step_000003" / "model.safetensors")
    began = load_file(inputs / "checkpoint" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {n: t.shape for n, t in began.items()}
    assert any((exported[name] != began[name]).any() for name in began)
    assert "| optimizer steps | 3 of 6 |" in (run / "exports" / "step_000003" / "README.md").read_text()


def test_a_run_whose_time_is_over(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches an end without checkpoint, evaluation or summary, other learning rates, time that a start forgets.

    Also the summary of a finished run that stays while the run goes on.
    """
    whole = alone(inputs, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(TimeBudget, "spent", property(lambda budget: 7000.0 if "step" in budget.longest else 0.0))
        run = alone(inputs, tmp_path / "run", "train.hours=2", "checkpoint.interval=0")
    assert "train.hours=2 leaves no time for another step: the run is finished after step 1" in capfd.readouterr().err
    assert (summary(run)["steps"], summary(run)["ended_by"]) == (1, "hours")
    assert names(run / "checkpoints") == ["step_000001"] and list(accuracies(run)) == [1]
    alone(inputs, run, "train.hours=2", "checkpoint.interval=0")
    assert len(metrics(run)) == 1 and summary(run)["ended_by"] == "hours"
    shown: list[bool] = []
    batch = Run.batch

    def look(of: Run, step: int) -> Batch:
        shown.append((run / "summary.json").exists())
        return batch(of, step)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "batch", look)
        alone(inputs, run, "train.hours=20", "checkpoint.interval=0")
    assert shown == [False] * 4
    assert summary(run)["ended_by"] == "steps"
    rates = [[line["learning_rate"] for line in metrics(each)] for each in (whole, run)]
    assert rates[0] == rates[1]


def _agree(rank: int) -> list[bool]:
    import torch

    return any_rank([rank == 0, False, rank == 1], torch.device("cpu"))


def test_one_rank_is_enough() -> None:
    """Catches ranks that end while others go on, and one reason taken for another."""
    assert run_ranks(_agree, 2) == [[True, False, True]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.early_stopping.set=other"], r"early_stopping\.set=other is none of the run's sets: heldout"),
        (["evaluation.early_stopping.patience=1"], r"patience needs evaluations"),
        (["checkpoint.best=true"], r"checkpoint\.best=true needs evaluations"),
        (["train.hours=-1"], r"train\.hours cannot be negative"),
    ],
)
def test_settings_that_cannot_be_meant(inputs: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    """Catches a run that could never end by what it was set to end by."""
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, overrides(inputs, tmp_path, *settings))
