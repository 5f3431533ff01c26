"""A process that ends with the one that started it, whatever ended that."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent ends; called in the new process."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
