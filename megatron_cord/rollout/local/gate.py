"""A gate that stops generating threads between two tokens, so that another thread may change the weights.

The host's order is not the device's: each thread queues work on a stream of its own. So the closing thread's stream
waits for what the others have queued, and theirs wait for what it has queued until it opens the gate again.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from megatron_cord.parallel import portability


class Gate:
    """A context manager around one batch, which calls ``pass_through`` between its tokens.

    Attributes:
        aborts: how often ``abort`` was called; a batch ends when this number changes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._closed, self._inside = False, 0
        self._left: dict[int, Any] = {}  # by thread, the mark of its stream when it last left
        self._opened: Any = None  # the same of the thread that opened it
        self.aborts = 0

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1
            portability.wait_for_mark(self._opened)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._inside -= 1
            self._left[threading.get_ident()] = portability.mark_stream()
            self._condition.notify_all()

    def pass_through(self) -> None:
        """Wait while the gate is closed."""
        if self._closed:
            self.__exit__(None, None, None)
            self.__enter__()

    def close(self) -> None:
        """Let no batch go on; return when all wait or have ended."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: self._inside == 0)
            for mark in self._left.values():
                portability.wait_for_mark(mark)
            self._left.clear()

    def open(self) -> None:
        """Let all batches go on."""
        with self._condition:
            self._closed = False
            self._opened = portability.mark_stream()
            self._condition.notify_all()

    def abort(self) -> None:
        """Let all batches that are inside end."""
        self.aborts += 1
