"""Exports while a run goes on: which are due, and one that fails. Whole ones: tests/trainer/endings/test_endings.py."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.checkpoint.directory import CheckpointDirectory
from megatron_cord.trainer.checkpoint.exports import Exports


def make(run: Path, folder: str, *steps: int) -> None:
    for step in steps:
        (run / folder / f"step_{step:06d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("made", "keep", "last", "waiting"),
    [
        ((), 0, None, [10, 20, 30]),
        ((), 2, None, [20, 30]),
        ((10,), 0, None, [20, 30]),
        ((30,), 0, None, []),
        ((20,), 1, 33, [33]),
        ((20,), 0, 33, [30, 33]),
    ],
)
def test_what_is_due(
    layout: Layout, tmp_path: Path, made: tuple[int, ...], keep: int, last: int | None, waiting: list[int]
) -> None:
    """Catches an old export that is made again after it was deleted, and a last step that is left out."""
    make(tmp_path, "checkpoints", 10, 15, 20, 30, 33)
    make(tmp_path, "exports", *made)
    exports = Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 10, keep)
    if last is not None:
        exports.finish_with(last)
    assert exports.waiting == waiting
    assert Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 0, keep).waiting == []


def test_without_exports_nothing_is_looked_up(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scans of directories, at every step, in a run that exports nothing."""
    exports = Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 0, 1)
    monkeypatch.setattr(CheckpointDirectory, "steps", lambda _: pytest.fail("the checkpoints are listed"))
    assert exports.waiting == [] and not exports.poll()


def test_one_that_cannot_begin_does_not_end_the_run(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an error of the operating system that ends training, and others that then are never tried."""
    make(tmp_path, "checkpoints", 1, 2)
    (tmp_path / "exports").write_text("in the way")
    exports = Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 1, 0)
    assert not exports.poll() and exports.waiting == []
    assert [message.split(":")[0] for message in caplog.messages] == [f"step {n} is not exported" for n in (1, 2)]
    assert all("the export cannot begin ([Errno " in message for message in caplog.messages)


def test_one_that_a_scheduler_stops_is_made_again(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a notice to all processes of a job that ends an export, or a stopped one that counts as failed."""
    make(tmp_path, "checkpoints", 1)
    exports = Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 1, 0)
    assert exports.poll()
    process = exports._process
    assert process is not None
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert exports.poll() and exports._process is not process
    assert exports.waiting == [1] and not caplog.messages
    exports.close()


@pytest.mark.slow
def test_one_that_fails_is_named_and_left(layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an export that ends the run, is tried for ever, or fails in silence; and a process that outlives it."""
    make(tmp_path, "checkpoints", 1)
    exports = Exports(tmp_path, CheckpointDirectory(tmp_path / "checkpoints"), 1, 0)
    deadline = time.monotonic() + 120
    while exports.poll():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (message,) = caplog.messages
    assert message.startswith("step 1 is not exported: ") and "does not name the Hugging Face checkpoint" in message
    assert "the run goes on (later: cord convert export " in message
    assert exports.waiting == []
    exports.close()
