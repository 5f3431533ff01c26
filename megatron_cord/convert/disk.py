"""Asks the kernel to write to the disk while the next bytes are made, instead of all at the end."""

from __future__ import annotations

import ctypes

_SYNC_FILE_RANGE_WRITE = 2


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Begins to write these bytes of a file to the disk, and does not wait; where the system cannot, they are written at the end."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
