"""Writing of a page to its file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic


def write_page(target: Path, page: str) -> Path:
    """Write a page, complete or not at all, and return its path. Raises CordError: it cannot be written."""
    try:
        if not target.parent.is_dir():  # a misspelt folder is refused, not made
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        write_atomic(target, page)
    except OSError as error:
        raise CordError(
            f"{target}: cannot write the report: {error.strerror}; give another file with --output"
        ) from None
    return target
