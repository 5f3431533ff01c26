"""The reason that is given for a failed write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cord.errors import CordError
from megatron_cord.trainer.checkpoint.storage import make_writable, storage_problem


def full(wrapped: bool = False) -> Exception:
    """Return the error of a full disk, as the operating system or as torch's writers raise it."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return RuntimeError(f"Worker failure: {error}") if wrapped else error


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_found(wrapped: bool) -> None:
    """Catches a full disk that ends in a traceback because a library has wrapped it."""
    assert storage_problem(full(wrapped)) == "No space left on device"
    assert storage_problem(CheckpointException("write", {1: (full(wrapped), None)})) == "No space left on device"  # type: ignore[dict-item]
    chained = KeyError("x")
    chained.__cause__ = full(wrapped)
    assert storage_problem(chained) == "No space left on device"


def test_other_errors_are_not_the_disks() -> None:
    """Catches a bug that is reported as a full disk and loses its traceback."""
    assert storage_problem(KeyError("x")) is None
    assert storage_problem(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert storage_problem(CheckpointException("write", {0: (ValueError("x"), None)})) is None  # type: ignore[dict-item]


def test_an_output_dir_that_cannot_be(tmp_path: Path) -> None:
    """Catches a traceback when the directory's place is a file, or below one."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CordError, match=r"output_dir=.* cannot be made .*; choose another directory"):
            make_writable(place)
    make_writable(tmp_path / "a" / "b")
    make_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
