"""What trackers have in common: their interface, what they need from the machine, and what happens when one fails."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic

logger = logging.getLogger(__name__)

_PENDING = 10_000  # records kept for a tracker that fails; older ones are in metrics.jsonl alone
_PAUSES = (30.0, 600.0)  # seconds before a tracker that failed is tried again: at first, and at most


class Tracker(Protocol):
    """A destination of scalars."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record finite values by tag after a step, numbered from 1 (0: before the first)."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is pending, and end the run there.

        Args:
            failed: whether an error ended the training.
        """
        ...


class PatientTracker:
    """A tracker whose failures end no run: named once; what it missed is recorded when it works again.

    It is tried again after a pause that doubles, so that a server that is gone does not slow each step down. A record
    that is refused twice while the one behind it is taken is left out, and counted: it would hold up all others.

    Args:
        name: for messages.
        tracker: does the work.
        clock: seconds that only grow.
    """

    def __init__(self, name: str, tracker: Tracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._tracker, self._clock = name, tracker, clock
        self._pending: deque[tuple[int, dict[str, float]]] = deque(maxlen=_PENDING)
        self._pause, self._not_before, self._named, self._missed = _PAUSES[0], 0.0, False, 0
        self._refusals = 0  # of the first pending record

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._missed += len(self._pending) == _PENDING
        self._pending.append((step, dict(scalars)))
        if self._clock() >= self._not_before:
            self._send()

    def close(self, *, failed: bool) -> None:
        """See `Tracker`. What could not be recorded is counted."""
        self._send(patience=1)  # there is no later time
        try:
            self._tracker.close(failed=failed)
        except Exception as error:
            self._failed(error)
        if missed := self._missed + len(self._pending):
            logger.warning("%s lacks %d records; metrics.jsonl has them", self._name, missed)

    def _send(self, patience: int = 2) -> None:
        """Record what is pending, up to a failure; leave out a record that alone is refused `patience` times."""
        while self._pending:
            try:
                self._tracker.log(*self._pending[0])
            except Exception as error:  # a client's errors have no common type
                self._refusals += 1
                if self._refusals < patience or not self._takes_the_next():
                    self._failed(error)
                    return
                self._name_failure(error)
                self._missed += 1
            self._pending.popleft()
            self._refusals = 0
        self._pause = _PAUSES[0]

    def _takes_the_next(self) -> bool:
        """Record what comes after the first pending record; return whether that worked."""
        if len(self._pending) < 2:
            return False
        try:
            self._tracker.log(*self._pending[1])
        except Exception:  # the tracker's fault, not the first record's
            return False
        del self._pending[1]
        return True

    def _failed(self, error: Exception) -> None:
        self._name_failure(error)
        self._not_before = self._clock() + self._pause
        self._pause = min(2 * self._pause, _PAUSES[1])

    def _name_failure(self, error: Exception) -> None:
        if not self._named:
            logger.warning(
                "%s fails (%s: %s); the run goes on and tries again; metrics.jsonl has every step",
                self._name,
                type(error).__name__,
                shortened(error),
            )
        self._named = True


def require(package: str, key: str, extra: str | None = None) -> None:
    """Refuse a tracker whose library is not installed.

    Args:
        package: to import.
        key: of the configuration that asks for it.
        extra: the extra that installs the package; None: it has the package's name.

    Raises:
        CordError: with the command that installs it.
    """
    found = find_spec(package)
    if found is None or found.origin is None:  # a folder of that name is no library
        raise CordError(
            f"{key} needs the package {package}; pip install megatron_cord[{extra or package}], or set {key}=off"
        )


def shortened(error: Exception) -> str:
    """Return an error's message on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_name(given: str | None, directory: Path) -> str:
    """Return the name of the run in a tracker: the one given, else that of its directory."""
    return given or directory.resolve().name


def kept_id(file: Path) -> str:
    """Return the run's id in a tracker, which is kept in the run's directory; drawn if there is none yet."""
    if not file.is_file():
        write_atomic(file, secrets.token_hex(4))
    return file.read_text()
