"""The runs of a comparison: a few at a time; complete ones are taken up, and one that fails does not stop the others.

Each run is `megatron_cord.train` in a process of its own, with a log beside its results. The log's file is locked as
long as the run lives, so that no second comparison starts the same run, not even after this one was killed and its runs
were not. A stop signal is passed on to the runs, which save a checkpoint; the same command continues from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import is_complete, keep
from megatron_cord.compare.plan import PlannedRun, prepare_command
from megatron_cord.errors import CordError
from megatron_cord.runtime.exit_status import INTERRUPTED, STOP_SIGNALS, STOPPED
from megatron_cord.trainer.first_evaluation import has_first_evaluation

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run.
        failure: why there is no result, in one line; None if there is one.
        found: it was complete before.
    """

    run: PlannedRun
    failure: str | None = None
    found: bool = False


class Listener:
    """Callbacks on the progress of a comparison; these do nothing."""

    def prepares(self, seed: int) -> None:
        """Note that a seed's inputs are being made."""

    def started(self, run: PlannedRun) -> None:
        """Note that a run starts or continues."""

    def stepped(self, run: PlannedRun, steps: int) -> None:
        """Note how many steps of a run are done."""

    def ended(self, outcome: Outcome) -> None:
        """Note that a run ended, or was complete before."""


class Runner:
    """Runs everything that is not complete; a context manager of the main thread, which ends the processes it started.

    Args:
        config: the comparison.
        runs: planned for it.
        listener: gets the progress.
    """

    def __init__(self, config: CompareConfig, runs: Sequence[PlannedRun], listener: Listener) -> None:
        self.config, self.listener = config, listener
        self.stopped = False  #: whether a stop signal came
        self.outcomes: list[Outcome] = []
        self._runs, self._waiting = tuple(runs), deque(runs)
        self._active: list[_Process] = []
        self._prepared: dict[int, str | None] = {}  # seed → why its inputs could not be made
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._stop) for number in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._active:
            process.ask_to_stop()
        for process in self._active:
            process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self) -> list[Outcome]:
        """Run all, and return their outcomes in the order in which they ended; fewer than planned after a stop signal.

        Raises:
            CordError: a directory holds a run with other settings, or one that is still running.
        """
        # All directories are checked before anything starts.
        complete = {run.name for run in self._waiting if is_complete(run)}
        while self._active or (self._waiting and not self.stopped):
            while self._waiting and not self.stopped and len(self._active) < self.config.jobs:
                run = self._waiting.popleft()
                if run.name in complete:
                    if run.kept is not None and not run.kept.is_file():
                        keep(run)
                    self._end(Outcome(run, found=True))
                elif (problem := self._prepare(run.seed)) is not None:
                    self._end(Outcome(run, problem))
                elif not self.stopped:
                    self._active.append(_Process(self.config.train, run, self._first_evaluation(run)))
                    self.listener.started(run)
            for process in list(self._active):
                self.listener.stepped(process.run, process.steps())
                if (status := process.poll()) is not None:
                    self._active.remove(process)
                    self._ended(process, status)
            if self._active:
                time.sleep(_POLL_SECONDS)
        return self.outcomes

    def _ended(self, process: _Process, status: int) -> None:
        run = process.run
        if status == 0 and is_complete(run):
            keep(run)
            self._end(Outcome(run))
        elif not (self.stopped and status in (STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM)):
            self._end(Outcome(run, f"{_reason(process.log, status)} (see {process.log})"))

    def _end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.listener.ended(outcome)

    def _prepare(self, seed: int) -> str | None:
        """Make a seed's inputs before its first run; return what failed."""
        command = prepare_command(self.config, seed)
        if seed not in self._prepared and command:
            self.listener.prepares(seed)
            log = Path(self.config.output_dir) / f"prepare-seed-{seed}.log"
            with _locked(log) as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                while process.poll() is None and not self.stopped:
                    time.sleep(_POLL_SECONDS)
            finally:
                process.terminate()
                status = process.wait()
            self._prepared[seed] = (
                None if status == 0 or self.stopped else f"prepare: {_reason(log, status)} (see {log})"
            )
        return self._prepared.get(seed)

    def _first_evaluation(self, run: PlannedRun) -> tuple[str, ...]:
        """Return the setting that spares a run its first evaluation: another run of the seed has made the same."""
        others = (other.directory for other in self._runs if other.seed == run.seed and other is not run)
        found = next((place for place in others if has_first_evaluation(run.config, place)), None)
        return () if found is None else (f"evaluation.first_from={found}",)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stopped:
            for process in self._active:
                process.kill()
            os._exit(INTERRUPTED)
        self.stopped = True
        for process in self._active:
            process.ask_to_stop()
        if number == signal.SIGINT and self._active:
            logger.info("Ctrl-C: the runs finish their step and save; a second Ctrl-C ends them at once")


class _Process:
    """A run in progress."""

    def __init__(self, train: str, run: PlannedRun, more: Sequence[str]) -> None:
        self.run, self.log = run, run.directory / "log.txt"
        launcher = (
            ["megatron_cord.launch", "--standalone", "--nproc-per-node", str(run.ranks), "-m"] if run.ranks > 1 else []
        )
        command = [sys.executable, "-m", *launcher, "megatron_cord.train", "--config", train, *run.overrides, *more]
        with _locked(self.log) as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.poll: Callable[[], int | None] = self._process.poll
        self.wait: Callable[[], int] = self._process.wait

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the run's processes at once; its checkpoints stay whole."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def steps(self) -> int:
        """Return how many steps its metrics have."""
        try:
            return (self.run.directory / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


def _locked(path: Path) -> IO[bytes]:
    """Open a log, empty and locked until all processes that have it open are gone.

    Raises:
        CordError: one of them is still running.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CordError(
            f"{path.parent}: a process of an earlier comparison is still running here; wait for it, or end it"
        ) from None
    os.truncate(path, 0)
    return file


def _reason(log: Path, status: int) -> str:
    """Return the last error line of a failed process; without one its status and its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if named is not None:
        return named.removeprefix("error: ")
    return f"it ended with status {status}: {lines[-1].strip() if lines else 'no output'}"
