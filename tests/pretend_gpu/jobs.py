"""Runs of the project on pretended GPUs, in processes forked from one that has imported everything.

As a program (``python -m tests.pretend_gpu.jobs``) this is that process: it reads a job a line, as JSON, forks the
ranks, and writes what each of them found as one line. `Jobs` is its client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.pretend_gpu.budgets import BUDGETS, Budget
from tests.pretend_gpu.record import RECORD, ROOT, PretendError

#: What a rank can run, by name: module and function, which takes the job's arguments.
WORK = {
    "train": "tests.pretend_gpu.work:run_training",
    "evaluate": "tests.pretend_gpu.work:run_evaluation",
    "weight_sync": "tests.pretend_gpu.work:run_weight_sync",
}


@dataclass(frozen=True)
class Wait:
    """How often the host waited for the device."""

    phase: str
    kind: str
    line: str
    times: int


@dataclass(frozen=True)
class Outcome:
    """What one rank found.

    Attributes:
        error: the traceback of what it raised; empty if it ended well.
        faults: what CUDA or NCCL would have refused, with the line.
        waits: of the host for the device.
        microbatches: made, by phase.
        steps: in which there was each phase.
    """

    error: str
    faults: list[str]
    waits: list[Wait]
    microbatches: dict[str, int]
    steps: dict[str, int]

    def check_waits(self, budgets: Mapping[str, Budget] = BUDGETS) -> None:
        """Check the host's waits in each phase against its budget.

        Raises:
            AssertionError: a phase waits more often; with the lines, the most frequent first.
        """
        for phase, budget in budgets.items():
            allowed = budget.allowed(self.steps.get(phase, 0), self.microbatches.get(phase, 0))
            assert self.waits_in(phase) <= allowed, (
                f"{self.waits_in(phase)} waits in phase {phase}, where {allowed} are allowed:\n{self.table(phase)}"
            )

    def waits_in(self, phase: str) -> int:
        """Return the waits of a phase."""
        return sum(wait.times for wait in self.waits if wait.phase == phase)

    def table(self, phase: str) -> str:
        """Return the waits of a phase by line, the most frequent first."""
        rows = sorted((w for w in self.waits if w.phase == phase), key=lambda w: -w.times)
        return "\n".join(f"{w.times:5d} × {w.kind}  {w.line}" for w in rows)


class Jobs:
    """The process that forks ranks; a context manager. Starting it takes as long as importing Megatron-Core."""

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pretend_gpu.jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def run(self, work: str, arguments: Sequence[str], *, ranks: int = 1) -> list[Outcome]:
        """Run a kind of `WORK` on ranks; return what each found.

        Raises:
            AssertionError: a rank broke a rule or raised; the message has its report.
        """
        outcomes = self.try_run(work, arguments, ranks=ranks)
        for rank, outcome in enumerate(outcomes):
            assert not outcome.faults and not outcome.error, f"rank {rank}: {outcome.faults}\n{outcome.error}"
        return outcomes

    def try_run(self, work: str, arguments: Sequence[str], *, ranks: int = 1) -> list[Outcome]:
        """Run without looking at what the ranks found."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"work": WORK.get(work, work), "arguments": list(arguments), "ranks": ranks}),
              file=self._process.stdin, flush=True)  # fmt: skip
        line = self._process.stdout.readline()
        assert line, "the process that forks the ranks has ended"
        return [Outcome(**found | {"waits": [Wait(*wait) for wait in found["waits"]]}) for found in json.loads(line)]


def main() -> None:
    """Serve jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runs print is no answer
    from tests.pretend_gpu import machine

    machine.install()
    import tests.pretend_gpu.work  # noqa: F401  imports what the ranks need

    machine.observe_run()
    for line in sys.stdin:
        print(json.dumps(_fork_ranks(json.loads(line))), file=answers, flush=True)


def _fork_ranks(job: dict[str, Any]) -> list[dict[str, Any]]:
    from tests.tiny_run import free_port

    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"{rank}.json" for rank in range(job["ranks"])]
        ranks = []
        for rank, file in enumerate(files):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, port, job, file)
            ranks.append(pid)
        for pid in ranks:
            os.waitpid(pid, 0)
        ended = {"error": "the rank ended without a report", "faults": [], "waits": [], "microbatches": {}, "steps": {}}
        return [json.loads(file.read_text()) if file.exists() else ended for file in files]


def _be_rank(rank: int, port: int, job: dict[str, Any], file: Path) -> None:
    """Work as one rank, write what was found, and end this process."""
    from importlib import import_module

    from tests.pretend_gpu.modes import pretending

    world = job["ranks"]
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    RECORD.pid = os.getpid()
    error = ""
    try:
        module, function = job["work"].split(":")
        with pretending():
            getattr(import_module(module), function)(job["arguments"])
    except PretendError:
        error = traceback.format_exc()
    except BaseException:
        error = traceback.format_exc()
    found = {
        "error": error,
        "faults": [f"{what} @ {line} ({times}×)" for (what, line), times in RECORD.faults.items()],
        "waits": [[*key, times] for key, times in RECORD.waits.items()],
        "microbatches": dict(RECORD.microbatches),
        "steps": RECORD.steps,
    }
    file.write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
