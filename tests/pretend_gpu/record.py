"""What the rules found in this process: faults, and how often the host waited for the device, by phase and line."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).parents[2])
_PROJECT = ROOT + "/megatron_cord"
_RULES = str(Path(__file__).parent)


class PretendError(RuntimeError):
    """What CUDA or NCCL would have raised, or done wrong in silence."""


class Record:
    """Counts of one process.

    Attributes:
        faults: by message and line of the project.
        waits: by phase, kind and line. A phase of another thread than the main one is that thread's name.
        microbatches: that were made, by phase.
        pid: of the process that has the device; children that it forks have none.
    """

    def __init__(self) -> None:
        self.faults: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.microbatches: Counter[str] = Counter()
        self.pid = os.getpid()
        self._phase = "start"
        self._begun: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    @property
    def phase(self) -> str:
        """What the thread does."""
        thread = threading.current_thread()
        return self._phase if thread is threading.main_thread() else f"thread {thread.name.rstrip('0123456789_-')}"

    def begin(self, phase: str, step: int) -> None:
        """Begin a phase of a step, in the main thread."""
        self._phase = phase
        self._begun.add((phase, step))

    @property
    def steps(self) -> dict[str, int]:
        """In how many steps there was each phase."""
        return dict(Counter(phase for phase, _ in self._begun))

    def fault(self, what: str) -> None:
        """Count a fault and raise it."""
        line = project_line()
        with self._lock:
            self.faults[what, line] += 1
        raise PretendError(f"{what} (at {line})")

    def wait(self, kind: str) -> None:
        """Count that the host waits for all the work that was queued on the device."""
        line = project_line()
        with self._lock:
            self.waits[self.phase, kind, line] += 1


def project_line() -> str:
    """Return the innermost line of the project, and of a library below it; of the caller where there is none."""
    library: str | None = None
    caller: str | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PROJECT):
            return _describe(frame, ROOT) + (f" [in {library}]" if library else "")
        if library is None and "site-packages" in file and "/torch/" not in file:
            library = _describe(frame, file.split("site-packages")[0] + "site-packages")
        if caller is None and file.startswith(ROOT) and not (file.startswith(_RULES) and "/test_" not in file):
            caller = _describe(frame, ROOT)
        frame = frame.f_back
    return library or caller or "unknown"


def _describe(frame: FrameType, root: str) -> str:
    code = frame.f_code
    return f"{os.path.relpath(code.co_filename, root)}:{frame.f_lineno} {code.co_name}"


RECORD = Record()
