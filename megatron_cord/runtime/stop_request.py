"""Requests to stop: Ctrl-C, SIGTERM, and SIGUSR1 as SLURM's notice before the time limit.

The first one only leaves a note, which the work reads where it can end without a loss. A second Ctrl-C ends the process
at once, also inside a library that does not return to Python: what is being written then has a hidden name, and is
removed or continued at the next start.
"""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_cord.runtime.exit_status import STOP_SIGNALS

logger = logging.getLogger(__name__)
_SHOW_CURSOR = "\x1b[?25h"  #: a progress bar hides it, and a process that is ended at once does not show it again


class StoppedError(Exception):
    """Work ended at a request, with all that was done saved; its text says so, and the exit status is `STOPPED`."""


class StopRequest:
    """Takes note of Ctrl-C and of `exit_status.STOP_SIGNALS` while it is entered; a context manager of the main thread.

    Args:
        until: names in the message of Ctrl-C what is finished first.

    Attributes:
        received: the first signal; None before it.
    """

    def __init__(self, until: str) -> None:
        self.received: signal.Signals | None = None
        self._until = until
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __bool__(self) -> bool:
        """Whether there was a request."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if sys.stderr.isatty():
                sys.stderr.write(_SHOW_CURSOR)
            logger.info("Ctrl-C: %s first; a second Ctrl-C leaves at once", self._until)
