"""Runs that a guard ends: what is measured, what they go back to, and what they do when they are started again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import make_samples, metrics, write_shards
from tests.trainer.endings.test_endings import names, summary
from tests.trainer.runs.test_train import alone

GUARD = "evaluation.guards.text.{}"
COMMON = ("evaluation.interval=1", "checkpoint.interval=0", "checkpoint.keep=1", "rollout.policy_prompts_per_step=0")


def guarded(**settings: Any) -> list[str]:
    """Return the settings of a guard of the held-out texts."""
    return [f"{GUARD.format(key)}={value}" for key, value in ({"set": "heldout", "max_drop": 0.5} | settings).items()]


@pytest.fixture(scope="module")
def known(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the setting of held-out questions whose answers are what the untrained model says to their texts."""
    root = tmp_path_factory.mktemp("known")
    run = alone(inputs, root / "run", *COMMON, "train.steps=1", "optimizer.learning_rate=1e-9")
    result = json.loads((run / "evaluations" / "step_000000" / "heldout.json").read_text())
    said = {row["id"]: row["text_response"] for row in result["answers"]}
    samples = [replace(sample, answer=said[sample.id]) for sample in make_samples(4, seed=2)]
    return f"data.evaluation={write_shards(root / 'heldout', samples)}"


@pytest.mark.parametrize("interval", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_back_to_what_held(
    interval: int, inputs: Path, known: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches weights after a drop that stay the newest, a checkpoint that held and is deleted, a loop of going back.

    Also metrics of the drop that are lost, an export of it, and a run that cannot go on from there with other settings.
    """
    run = tmp_path / "run"
    guard = guarded(action="restore")
    alone(inputs, run, *COMMON, known, *guard, "train.steps=2", "optimizer.learning_rate=1e-9")
    assert summary(run)["ended_by"] == "steps" and summary(run)["guard"] is None
    assert summary(run)["guards"]["text"]["held"] and summary(run)["guards"]["text"]["accuracy"] == 1.0
    assert names(run / "checkpoints") == ["step_000002"]

    (run / "exports" / "step_000003").mkdir(parents=True)  # made before the evaluation
    exports = f"checkpoint.export_interval={interval}"
    too_high = (*COMMON, known, *guard, "train.steps=6", "optimizer.learning_rate=3", exports)
    alone(inputs, run, *too_high)
    errors = capfd.readouterr().err
    assert "guard text: text accuracy on heldout has dropped by 100.0 points" in errors
    assert "the guard text ends the run after step 3: the run is finished, and goes back to step 2" in errors
    assert names(run / "checkpoints") == ["set_aside_step_000003", "step_000002"]
    assert names(run / "exports") == ["set_aside_step_000003", *["step_000002"] * interval]
    ended = summary(run)
    assert (ended["steps"], ended["ended_by"], ended["text_accuracy_after"]) == (2, "guard", 1.0)
    assert [ended["guard"][key] for key in ("name", "step", "restored", "held")] == ["text", 3, 2, False]
    assert ended["guards"]["text"]["held"]
    (alert,) = [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines() if "guard text" in line]
    assert alert["step"] == 3 and "max_drop=0.5" in alert["words"]

    alone(inputs, run, *too_high)
    assert len(metrics(run)) == 3 and summary(run) == ended
    assert "the guard text ended this run after step 3; it stays at step 2" in capfd.readouterr().err
    alone(inputs, run, *too_high, "optimizer.learning_rate=1e-9", "train.steps=3")
    assert len(metrics(run)) == 3 and summary(run)["ended_by"] == "steps" and summary(run)["guards"]["text"]["held"]


def test_a_run_stops_or_warns(inputs: Path, known: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a run that trains on after its guard, one that its guard's warning ends, one without a checkpoint."""
    stop = (*COMMON, known, "train.steps=3", "optimizer.learning_rate=3")
    for action in ("stop", "restore"):  # no checkpoint held
        run = alone(inputs, tmp_path / action, *stop, *guarded(action=action))
        assert (summary(run)["steps"], summary(run)["ended_by"], len(metrics(run))) == (1, "guard", 1)
        assert summary(run)["guard"]["restored"] is None and names(run / "checkpoints") == ["step_000001"]
        before = summary(run)
        alone(inputs, run, *stop, *guarded(action=action))
        assert len(metrics(run)) == 1 and summary(run) == before
    run = alone(inputs, tmp_path / "stop", *stop, *guarded(action="warn"))
    assert (summary(run)["steps"], summary(run)["ended_by"]) == (3, "steps")
    assert not summary(run)["guards"]["text"]["held"]
    assert capfd.readouterr().err.count("beyond max_drop=0.5") == 4


def test_a_run_is_guarded_at_its_end_alone(inputs: Path, known: str, tmp_path: Path) -> None:
    """Catches a guard that measures nothing where a run is evaluated before and after training alone."""
    settings = (*COMMON, known, "train.steps=2", "optimizer.learning_rate=3", "evaluation.interval=0")
    run = alone(inputs, tmp_path / "run", *settings, *guarded(action="stop"))
    assert (summary(run)["steps"], summary(run)["ended_by"], len(metrics(run))) == (2, "guard", 2)
    assert not summary(run)["guards"]["text"]["held"]
