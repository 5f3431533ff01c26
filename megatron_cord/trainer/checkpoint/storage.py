"""The run's directory: whether it can be written, and the system's reason when writing failed."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from megatron_cord.errors import CordError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR)
#: messages of torch's writers when the system refuses a write
_TORCH_WRITERS = ("PytorchStreamWriter failed", "iostream error", "inline_container", "error: <class 'OSError'>")
#: Megatron's message when the process that writes has left no result
_WRITER_GONE = "results_queue should not be empty"
_ERRNO = re.compile(r"\[Errno (\d+)\]")


def make_writable(directory: Path) -> None:
    """Make the directory if it does not exist.

    Raises:
        CordError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CordError(f"output_dir={directory} cannot be made ({error.strerror}); choose another directory") from None
    if not os.access(directory, os.W_OK):
        raise CordError(f"output_dir={directory} is not writable; choose another directory")


def storage_problem(error: BaseException) -> str | None:
    """Return the disk's part in an error, also inside torch's wrappers; None if the disk is not the cause."""
    failures = getattr(error, "failures", {})  # of torch's CheckpointException: by rank
    for seen in [error, *(failure[0] for failure in failures.values())]:
        cause: BaseException | None = seen
        while cause is not None:
            named = _ERRNO.search(str(cause))  # torch and Megatron often keep only the text of an OSError
            if named and int(named[1]) in _DISK:
                return os.strerror(int(named[1]))
            if any(text in str(cause) for text in _TORCH_WRITERS):
                return "a file could not be written"
            if _WRITER_GONE in str(cause):
                return "the process that wrote it was killed; is there enough memory?"
            cause = cause.__cause__ or cause.__context__
    return None
