"""Exports while a run goes on: which are due, and one that fails. Whole ones: tests/trainer/test_endings.py."""

from __future__ import annotations

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
