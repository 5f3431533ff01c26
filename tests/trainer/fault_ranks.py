"""Ranks of a training run as processes that start at once: forked from one that has imported everything.

For tests that need many runs.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from megatron_cord.runtime import entry
from megatron_cord.trainer.collection import Collector
from tests.gloo import PRELOADED
from tests.tiny_run import free_port, make_run

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Ranks:
    """A run on several ranks; what they print is in `log`.

    Args:
        settings: of the run.
        log: a file.
        stuck: the rank that will hang.
        where: it hangs: in its first step's rollouts; there, in a library that keeps the interpreter's lock; or
            before it meets the others.
        halt: the step, from 1, in which all ranks wait until they are killed.
    """

    def __init__(
        self,
        settings: Sequence[str],
        log: Path,
        *,
        world: int = 2,
        stuck: int | None = None,
        where: Literal["rollout", "library", "start"] = "rollout",
        halt: int | None = None,
    ) -> None:
        self.log, self.begun = log, time.monotonic()
        port = free_port()
        self.processes: list[BaseProcess] = [
            _context.Process(
                target=_rank, args=(rank, world, port, list(settings), str(log), where if rank == stuck else None, halt)
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, happened: Callable[[], Any], seconds: float) -> bool:
        """Wait until something has happened or the first rank ended; return whether it has happened."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline or any(p.exitcode is not None for p in self.processes):
                return False
            time.sleep(0.002)
        return True

    def kill(self, rank: int) -> bool:
        """SIGKILL; whether the rank was alive."""
        process = self.processes[rank]
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode == -signal.SIGKILL

    @property
    def met(self) -> bool:
        """Whether the ranks have found each other: what they print first comes after that."""
        return self.log.is_file() and self.log.stat().st_size > 0

    def end_as_launcher(self) -> None:
        """Send SIGTERM to ranks that wait at the start for one that was killed, as launchers do."""
        for process in self.processes:
            process.terminate()

    def statuses(self, seconds: float) -> list[int | None]:
        """How the ranks ended; None for one that did not within this time, and was killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return ended


def run_forked(settings: Sequence[str], log: Path, *, world: int = 2, seconds: float = 300) -> tuple[int, str]:
    """Run to the end on forked ranks, for tests of the ranks and not of the launcher.

    Returns:
        the first status that is not 0, and what the ranks printed.
    """
    statuses = Ranks(settings, log, world=world).statuses(seconds)
    return next((status if status is not None else -1 for status in statuses if status != 0), 0), log.read_text()


def _rank(rank: int, world: int, port: int, settings: list[str], log: str, stuck: str | None, halt: int | None) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tempfile.tempdir = str(Path(log).parent)  # what tells the ranks who reports: no launcher removes it
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": str(port),
    }
    if stuck == "start":
        time.sleep(3600)
    if stuck:
        Collector.score = _never_answer if stuck == "rollout" else _never_let_go  # type: ignore[method-assign, assignment]
    if halt:
        Collector.score = _scoring_until(halt - 1, Collector.score)  # type: ignore[method-assign, assignment]
    entry.run(lambda: make_run(settings))


def _scoring_until(
    step: int, score: Callable[[Collector, Any, Sequence[Any]], Any]
) -> Callable[[Collector, Any, Sequence[Any]], Any]:
    """Return a function that scores the rollouts of steps, counted from 0, and never returns in this one."""

    def scoring(self: Collector, batch: Any, rollouts: Sequence[Any]) -> Any:
        if batch.step == step:
            time.sleep(3600)
        return score(self, batch, rollouts)

    return scoring


def _never_answer(self: Collector, batch: Any, rollouts: Sequence[Any]) -> None:
    """Never return."""
    time.sleep(3600)


def _never_let_go(self: Collector, batch: Any, rollouts: Sequence[Any]) -> None:
    """Never return from a call of C that keeps the interpreter's lock, so that no other thread runs."""
    ctypes.PyDLL(None).sleep(3600)
