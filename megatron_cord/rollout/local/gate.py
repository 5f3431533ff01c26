"""A gate that stops generating threads between two tokens, so that another thread may change the weights."""

from __future__ import annotations

import threading
from types import TracebackType


class Gate:
    """A context manager around one batch, which calls ``pass_through`` between its tokens.

    Attributes:
        aborts: how often ``abort`` was called; a batch ends when this number changes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._closed, self._inside = False, 0
        self.aborts = 0

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._inside -= 1
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

    def open(self) -> None:
        """Let all batches go on."""
        with self._condition:
            self._closed = False
            self._condition.notify_all()

    def abort(self) -> None:
        """Let all batches that are inside end."""
        self.aborts += 1
