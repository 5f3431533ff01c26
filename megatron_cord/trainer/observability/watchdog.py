"""The watchdog records where a rank without progress hangs, and ends it, so that the launcher can restart the ranks.

The loop names each phase as it begins. When a phase lasts too long, a thread writes the stacks of this rank to
`stacks/rank00000.txt`, prints one line, and ends the process with status `HUNG`. Ranks that wait for the stuck one do
the same; their lines show a collective, its line shows the culprit. If even the thread cannot run, because some
library keeps the interpreter's lock, a timer that needs no lock writes the stacks half a minute later and exits with
status 1.

Simplification: phases without a bound of their own (start, evaluation, reference answers) are not watched; there
`parallel.timeout_minutes` ends the ranks that wait.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from megatron_cord.runtime.exit_status import HUNG

logger = logging.getLogger(__name__)

_LOCKED_SECONDS = 30.0  #: how much later the timer fires that needs no lock
#: between dump and exit: ranks that wait write their stacks too, before they notice that this one has ended
_PEERS_SECONDS = 3.0


class Watchdog:
    """A context manager that watches the thread which enters it.

    Args:
        seconds: how long a phase may last; 0 turns the watchdog off.
        directory: of the stacks.
        rank: of this process.
    """

    def __init__(self, seconds: float, directory: Path, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self.path = directory / f"rank{rank:05d}.txt"
        self._phase: tuple[float, int, str] | None = None
        self._ended = threading.Event()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.seconds:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w")
            self._watched = threading.get_ident()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.rest()
            self._ended.set()
            self._thread.join()
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)  # nothing was written

    def phase(self, name: str, step: int) -> None:
        """Begin a phase of a step, numbered from 1, and its time."""
        if self._file is not None:
            self._phase = (time.monotonic(), step, name)
            faulthandler.dump_traceback_later(self.seconds + _LOCKED_SECONDS, file=self._file, exit=True)

    def rest(self) -> None:
        """Stop the time: what follows may last for any length of time."""
        if self._file is not None:
            self._phase = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            phase = self._phase
            if phase is not None and time.monotonic() - phase[0] > self.seconds:
                self._end(*phase)

    def _end(self, begun: float, step: int, name: str) -> None:
        assert self._file is not None
        frame = traceback.extract_stack(sys._current_frames()[self._watched])[-1]
        line = (
            f"rank {self.rank} made no progress for {time.monotonic() - begun:.0f} s in step {step}, "
            f"phase {name}: it is in {frame.name} ({frame.filename}:{frame.lineno}); all stacks are in {self.path}"
        )
        self._file.write(f"error: {line}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        os.fsync(self._file.fileno())
        logger.error(line)
        self._ended.wait(_PEERS_SECONDS)
        os._exit(HUNG)
