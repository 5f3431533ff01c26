"""Checkpoints: whole or invisible, verified when read, the same on every layout, written while training goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout, finalize
from megatron_cord.runtime.files import file_digest
from megatron_cord.trainer.checkpoint import writer as writing
from megatron_cord.trainer.checkpoint.directory import CheckpointDirectory
from megatron_cord.trainer.checkpoint.manifest import find_damage, write_manifest
from tests.tiny_run import losses, make_run, overrides, write_checkpoint
from tests.trainer.fault_ranks import Ranks


def names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


def small(directory: Path, step: int) -> Path:
    """Write something that looks like a checkpoint."""
    path = directory / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(100)))
    (path / "state.json").write_text("{}")
    write_manifest(path, {"weights": file_digest(path / "weights")})
    return path


def alone(inputs: Path, output: Path, *settings: str) -> Path:
    """Run in this process alone."""
    try:
        make_run(overrides(inputs, output, *settings))
    finally:
        finalize()
    return output


def test_damage_is_named(layout: Layout, tmp_path: Path) -> None:
    """Catches one changed bit, a byte too few, a file that is gone and a list that is gone, each named."""
    path = small(tmp_path, 1)
    assert find_damage(path) is None
    whole = (path / "weights").read_bytes()
    (path / "weights").write_bytes(whole[:50] + b"\xff" + whole[51:])
    assert find_damage(path) == "weights does not have the checksum that it was written with"
    (path / "weights").write_bytes(whole[:99])
    assert find_damage(path) == "weights has 99 of 100 bytes"
    (path / "weights").unlink()
    assert find_damage(path) == "weights: No such file or directory"
    (path / "manifest.json").unlink()
    assert find_damage(path) == "manifest.json is missing"


def test_a_damaged_checkpoint_falls_back(layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a damaged checkpoint that is used, deleted, passed over silently or counted, and leftovers that stay."""
    for step in (2, 10, 999999, 1000000):
        small(tmp_path, step)
    for step in (999999, 1000000):
        (tmp_path / f"step_{step}" / "weights").write_bytes(b"")
    (tmp_path / ".step_000004.partial-0").mkdir()
    directory = CheckpointDirectory(tmp_path)
    assert directory.newest_undamaged() == tmp_path / "step_000010"
    assert len(caplog.messages) == 2
    assert all("is damaged (weights has 0 of 100 bytes); using step_000010" in line for line in caplog.messages)
    assert names(tmp_path) == ["damaged_step_1000000", "damaged_step_999999", "step_000002", "step_000010"]
    for step in (2, 10):
        (tmp_path / f"step_{step:06d}" / "weights").write_bytes(b"")
    with pytest.raises(
        CordError, match=r"step_000010 is damaged \(weights has 0 of 100 bytes\), and no earlier checkpoint is whole"
    ):
        directory.newest_undamaged()
    assert CheckpointDirectory(tmp_path / "none").newest_undamaged() is None


def test_a_run_goes_on_from_the_checkpoint_before(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a fall-back that does not reach the run, other losses after it, and ways to save that differ."""
    waiting = alone(inputs, tmp_path / "waiting", "checkpoint.asynchronous=false", "checkpoint.keep=0")
    meanwhile = alone(inputs, tmp_path / "meanwhile", "checkpoint.keep=0")
    assert losses(meanwhile) == losses(waiting)
    for step in (2, 4, 5):
        first, second = (run / "checkpoints" / f"step_{step:06d}" for run in (meanwhile, waiting))
        assert names(first) == names(second)
        assert file_digest(first / "__0_0.distcp") == file_digest(second / "__0_0.distcp")
    shutil.rmtree(meanwhile / "checkpoints" / "step_000005")
    damaged = meanwhile / "checkpoints" / "step_000004" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    alone(inputs, meanwhile)
    lines = capsys.readouterr().err + caplog.text
    why = "__0_0.distcp does not have the checksum that it was written with"
    assert f"step_000004 is damaged ({why}); using step_000002" in lines
    assert "resuming after step 2" in lines
    assert losses(meanwhile) == losses(waiting)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp=1", "pp=2"),
        pytest.param("ep=2", "ep=1", marks=pytest.mark.slow),
        pytest.param("ep=1", "ep=4", marks=pytest.mark.slow),
        pytest.param("ep=4", "ep=2", marks=pytest.mark.slow),
        pytest.param("tp=2", "tp=1", marks=pytest.mark.slow),
        pytest.param("pp=2", "pp=1", marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_on_another_layout(inputs: Path, tmp_path: Path, before: str, after: str) -> None:
    """Catches states that are split or joined wrongly: later losses agree to 1e-5 with those of the layout that saved.

    Two ranks, and four for ep=4, share the data where the layout does not need them. Models of ep have experts.
    """
    more: tuple[str, ...] = ()
    if before.startswith("ep="):
        write_checkpoint(tmp_path / "mixture", experts=4)
        more = (f"model.checkpoint={tmp_path / 'mixture'}", "objective.router_aux_loss=0.01")

    def run_on(output: Path, setting: str) -> Path:
        settings = overrides(inputs, output, f"parallel.{setting}", "checkpoint.keep=0", *more)
        world = 4 if setting == "ep=4" else 2
        ranks = Ranks(settings, output.with_suffix(".log"), world=world)
        assert ranks.statuses(300) == [0] * world, ranks.log.read_text()
        return output

    whole = run_on(tmp_path / "whole", before)
    shutil.copytree(whole, tmp_path / "continued")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "continued" / "checkpoints" / f"step_{step:06d}")
    continued = run_on(tmp_path / "continued", after)
    assert "resuming after step 2" in continued.with_suffix(".log").read_text()
    assert [loss for loss, _ in losses(continued)] == pytest.approx([loss for loss, _ in losses(whole)], rel=1e-5)


def test_a_writer_that_is_killed(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint without its files, a run that waits for its dead writer, and an earlier one that is lost."""
    output = alone(inputs, tmp_path / "run", "train.steps=2", "checkpoint.interval=2")
    with monkeypatch.context() as killed:
        killed.setattr(writing, "_write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(CordError, match="the process that wrote it was killed; is there enough memory"):
            alone(inputs, output, "train.steps=4", "checkpoint.interval=2")
    assert names(output / "checkpoints") == ["step_000002"]
    alone(inputs, output, "train.steps=4", "checkpoint.interval=2")
    assert len(losses(output)) == 4
