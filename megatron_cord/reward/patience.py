"""A time limit on Python code that works in any thread, where signals work in the main thread only.

It counts the code's own time on a processor, so that a busy machine gives the same results as an idle one.

Simplification: one long call into C is not interrupted; callers keep the inputs of such calls small.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")
_INTERRUPTIONS = 50


class _TimeUp(BaseException):
    """No Exception, so that the interrupted code does not handle it as one of its own."""


def within(seconds: float, function: Callable[[], Result], *, otherwise: Result) -> Result:
    """Return what `function` returns, or `otherwise` when it raises an exception or computes for longer.

    Code that waits instead of computing is given up after a hundred times as long.
    """
    results: list[Result] = []
    clocks: list[int] = []

    def work() -> None:
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        with suppress(Exception, _TimeUp):
            results.append(function())

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    given_up = time.monotonic() + 100 * seconds
    while worker.is_alive() and time.monotonic() < given_up:
        worker.join(seconds / 20)
        with suppress(OSError):  # the thread has just ended
            if clocks and time.clock_gettime(clocks[0]) > seconds:
                break
    # One may get lost: in a bare except, or because Python drops what a finalizer or a callback of the garbage
    # collector raises.
    for _ in range(_INTERRUPTIONS):
        if not worker.is_alive():
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeUp))
        worker.join(0.1)
    return results[0] if results else otherwise
