"""Where a run begins: forks go on in their own directory, others' checkpoints stay as they are, runs may be moved."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import finalize
from megatron_cord.report.page.page import render
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig, load_run_config
from tests.tiny_run import losses, metrics, overrides, write_checkpoint, write_inputs
from tests.trainer.runs.test_train import alone, saved, stop_after

NO_TEXT = "evaluation.samples=1"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def parent(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of four steps that others begin from."""
    return alone(inputs, tmp_path_factory.mktemp("parent") / "run", "train.steps=4", "checkpoint.keep=0")


def times(directory: Path) -> dict[Path, int]:
    """Return when each file was changed."""
    return {path: path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("named", ["run", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_a_fork_goes_on_in_its_own_directory(
    inputs: Path, parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    """Catches a restart that begins at PATH again, rotates newer checkpoints away, or writes into the other run.

    Also a fork without an evaluation before training, a summary or a report, and losses other than the run's own.
    """
    path = parent if named == "run" else parent / "checkpoints" / "step_000002"
    begun = 4 if named == "run" else 2
    before = times(parent)
    fork = [f"resume={path}", "train.steps=8", "checkpoint.interval=1", "checkpoint.keep=2"]
    whole = alone(inputs, tmp_path / "whole", *fork)
    assert steps_of(whole) == list(range(begun + 1, 9)) and times(parent) == before
    cut = stop_after(7, whole, tmp_path / "cut")
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "evaluations" / "step_000008")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        alone(inputs, cut, *fork)
    assert "resuming after step 7" in caplog.messages and checkpoints(cut) == ["step_000007", "step_000008"]
    assert losses(cut) == losses(whole)
    assert (cut / "evaluations" / f"step_{begun:06d}" / "heldout.json").is_file()
    summary = json.loads((cut / "summary.json").read_text())
    assert (summary["begun_after_step"], summary["steps"]) == (begun, 8)
    assert render(cut).is_file()
    origin = json.loads((whole / "settings_changes.jsonl").read_text().splitlines()[0])
    assert origin["step"] == begun and origin["checkpoint"].startswith(str(parent))


def test_a_new_run_begins_with_the_weights_of_another(
    inputs: Path, parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches init_from that keeps the step, takes the optimizer unasked or not at all, or is taken again later.

    Also a frozen part of it that the engine never gets, which the logprob mismatch would show.
    """
    alike, moments = (
        alone(inputs, tmp_path / name, f"init_from={parent}", "checkpoint.interval=1", "checkpoint.keep=0", *more)
        for name, more in {"weights": (), "moments": ("init_optimizer=true",)}.items()
    )
    assert steps_of(alike) == [1, 2, 3, 4, 5] and losses(alike)[0] == losses(moments)[0]
    assert losses(alike)[1] != losses(moments)[1] and losses(alike)[0] != losses(parent)[0]
    assert json.loads((alike / "summary.json").read_text())["begun_after_step"] == 0
    cut = stop_after(3, alike, tmp_path / "cut")
    with caplog.at_level(logging.INFO):
        alone(inputs, cut, f"init_from={parent}")
    assert "resuming after step 3" in caplog.messages and losses(cut) == losses(alike)
    with pytest.raises(CordError, match=r"belongs to a run that began with init_from=.*/run, not .*/weights; choose"):
        alone(inputs, cut, f"init_from={alike}")
    frozen = alone(
        inputs,
        tmp_path / "frozen",
        f"init_from={parent / 'checkpoints' / 'step_000004'}",
        "model.freeze=[language_model,adapter]",
        "train.steps=2",
        "rollout.max_logprob_mismatch=1e-3",
    )
    kept, other = saved(parent, 4), saved(frozen, 2)
    name = "language_model.output_layer.weight"
    assert torch.equal(kept[name], other[name])
    # The frozen teacher is model.checkpoint, not the language model that is frozen here.
    assert metrics(frozen)[0]["kl"] != pytest.approx(0)


def test_a_new_run_begins_with_a_hugging_face_directory(inputs: Path, tmp_path: Path) -> None:
    """Catches init_from that is ignored, and weights of another architecture."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    plain = alone(inputs, tmp_path / "plain", "train.steps=1", NO_TEXT)
    begun = alone(inputs, tmp_path / "begun", "train.steps=1", NO_TEXT, f"init_from={other}")
    again = alone(inputs, tmp_path / "again", "train.steps=1", NO_TEXT, f"init_from={inputs / 'checkpoint'}")
    assert losses(begun) != losses(plain) == losses(again)
    wide = write_checkpoint(tmp_path / "wide", ffn_size=64)
    for settings, message in {
        (f"init_from={wide}",): "is of another architecture than model.checkpoint",
        (f"init_from={other}", "init_optimizer=true"): "is a Hugging Face directory, which holds no optimizer",
    }.items():
        with pytest.raises(CordError, match=message):
            alone(inputs, tmp_path / "none", *settings)


def test_what_is_not_there_is_named_at_once(
    inputs: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hub that is asked for a missing directory, a story about the network, and a fork from nothing."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something asks the network"))
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "notes.txt").touch()
    cases: dict[tuple[str, ...], str] = {
        ("model.checkpoint=no/model",): r"model.checkpoint: no/model does not exist; give a Hugging Face",
        ("resume=no/run",): r"resume=no/run does not exist \(looked at /",
        (f"resume={tmp_path / 'stuff'}",): r"is neither a checkpoint nor a run with one \(it holds notes.txt\)",
        ("init_from=no/run",): r"init_from=no/run does not exist",
        ("init_optimizer=true",): "init_optimizer=true needs init_from",
        (f"resume={parent}", f"init_from={parent}"): "give one of them",
        (f"resume={parent}", "seed=1"): "belongs to a run with seed=0",
        (f"resume={parent}", "train.steps=3"): "is after step 4, and train.steps=3 lies behind it",
        (f"resume={parent}", "data.shuffle=false"): "data.shuffle=true: in another order",
    }
    for settings, message in cases.items():
        with pytest.raises(CordError, match=message):
            alone(inputs, tmp_path / "run", *settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_path_that_is_older_does_not_win(
    inputs: Path, parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches newer checkpoints that are lost to resume=PATH, or a PATH that is passed over silently."""
    run = shutil.copytree(parent, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        alone(inputs, run, f"resume={run / 'checkpoints' / 'step_000002'}", "train.steps=5")
    assert any("counts only where output_dir holds no checkpoint" in line for line in caplog.messages)
    assert losses(run)[:4] == losses(parent) and steps_of(run) == [1, 2, 3, 4, 5]


def test_a_run_that_was_moved(inputs: Path, parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that begins anew in the place it was moved from, and a move that nothing says."""
    shutil.copytree(parent, tmp_path / "old")
    config = tmp_path / "old" / "config.yaml"
    config.write_text(config.read_text().replace(str(parent), str(tmp_path / "old")))
    moved = (tmp_path / "old").rename(tmp_path / "new")
    with caplog.at_level(logging.INFO):
        run(load_run_config(moved / "config.yaml", ["train.steps=5"]))
    assert not (tmp_path / "old").exists() and steps_of(moved) == [1, 2, 3, 4, 5]
    assert any(f"was moved or copied, and goes on in {moved}" in line for line in caplog.messages)
    assert any("the run was moved or copied: it began in" in line for line in caplog.messages)
    chosen = load_run_config(moved / "config.yaml", [f"output_dir={tmp_path / 'other'}"])
    assert chosen.output_dir == str(tmp_path / "other")


def run(config: RunConfig) -> None:
    try:
        train(config)
    finally:
        finalize()


def test_the_configuration_of_a_fork_says_where_it_is_from(inputs: Path, tmp_path: Path) -> None:
    """Catches a key that a configuration file cannot have."""
    settings: Any = overrides(inputs, tmp_path, "init_from=runs/a", "init_optimizer=true")
    assert load_config(RunConfig, None, settings).init_from == "runs/a"
