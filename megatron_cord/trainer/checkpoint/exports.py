"""Exports of a run's checkpoints to Hugging Face directories, while training goes on.

Rank 0 starts `cord convert export` as a process of its own, for one checkpoint after the other; the directory
`exports/step_000100` is whole when it appears. A checkpoint stays until its export is made. An export that was
interrupted is continued, by the same run or its next start; one that fails is named, and does not end the run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_cord.runtime.parent import end_with_parent
from megatron_cord.trainer.checkpoint.directory import CheckpointDirectory

logger = logging.getLogger(__name__)
FOLDER = "exports"
_VISIBLE = re.compile(r"step_(\d+)")


class Exports:
    """The exports of one run. Methods are of rank 0 alone, but for `is_due`.

    Args:
        run: its directory.
        checkpoints: of the run.
        interval: steps between exports; 0: none.
        keep: so many of the newest stay; 0 keeps all.

    Attributes:
        interval: the same.
    """

    def __init__(self, run: Path, checkpoints: CheckpointDirectory, interval: int, keep: int) -> None:
        self.directory = run / FOLDER
        self._checkpoints, self.interval, self._keep = checkpoints, interval, keep
        self._last: int | None = None
        self._failed: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0  # that is being exported

    def is_due(self, step: int) -> bool:
        """Return whether the weights after this step are to be exported."""
        return bool(self.interval) and (step % self.interval == 0 or step == self._last)

    def finish_with(self, step: int) -> None:
        """Export the step with which the run ends, too."""
        self._last = step

    def set_aside_after(self, step: int) -> None:
        """Rename all exports after a step to `set_aside_step_…`, and end one that is in progress."""
        self.close()
        for later in (each for each in self._made() if each > step):
            path = self._path_of(later)
            aside = path.with_name(f"set_aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)

    @property
    def waiting(self) -> list[int]:
        """Steps whose checkpoints are there and whose exports are not, ascending; no more than are kept."""
        if not self.interval:
            return []
        newest = max(self._made(), default=0)
        due = [s for s in self._checkpoints.steps() if self.is_due(s) and s > newest and s not in self._failed]
        return due[-self._keep :] if self._keep else due

    def poll(self) -> bool:
        """Note what has ended, begin what is next; return whether an export is in progress."""
        if self._process is not None and self._process.poll() is not None:
            self._ended(self._process.returncode)
            self._process = None
        while self._process is None and (waiting := self.waiting):  # one that cannot begin does not wait any more
            self._begin(waiting[0])
        return self._process is not None

    def close(self) -> None:
        """End the export in progress; what is finished of it is kept. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _made(self) -> list[int]:
        names = (_VISIBLE.fullmatch(path.name) for path in self.directory.glob("step_*"))
        return sorted(int(name[1]) for name in names if name is not None)

    def _path_of(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def _log_of(self, step: int) -> Path:
        return self.directory / f".step_{step:06d}.log"

    def _begin(self, step: int) -> None:
        self._step = step
        source, target = self._checkpoints.path_of(step), self._path_of(step)
        command = [sys.executable, "-m", "megatron_cord.cli", "convert", "export", str(source), str(target)]
        try:
            self.directory.mkdir(exist_ok=True)
            with self._log_of(step).open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    preexec_fn=_quietly_with(os.getpid()),
                )
        except (OSError, subprocess.SubprocessError) as error:
            self._fail(step, f"the export cannot begin ({error})")

    def _ended(self, status: int) -> None:
        step, target = self._step, self._path_of(self._step)
        if status == 0 and target.is_dir():
            logger.info("exported step %d: %s", step, target)
            self._log_of(step).unlink(missing_ok=True)
            for old in self._made()[: -self._keep] if self._keep else ():
                shutil.rmtree(self._path_of(old), ignore_errors=True)
            return
        if status == -signal.SIGTERM:  # as a scheduler stops all processes of a job; the run itself, too, or it goes on
            return
        lines: list[str] = []
        with suppress(OSError):
            lines = self._log_of(step).read_text(errors="replace").strip().splitlines()
        self._fail(step, lines[-1].removeprefix("error: ") if lines else f"the export ended with status {status}")

    def _fail(self, step: int, reason: str) -> None:
        self._failed.add(step)
        message = "step %d is not exported: %s; the run goes on (later: cord convert export %s %s)"
        logger.warning(message, step, reason, self._checkpoints.path_of(step), self._path_of(step))


def _environment() -> dict[str, str]:
    """Return this process's environment without what makes it a rank: an export is a process alone, without a GPU."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in of_ranks and not k.startswith("TORCHELASTIC_")}
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def _quietly_with(parent: int) -> Callable[[], None]:
    """Return what the new process does first: make way for training, leave requests to stop to the run, end with it."""

    def begin() -> None:
        os.nice(10)
        for number in (signal.SIGINT, signal.SIGUSR1):  # these may reach every process of a terminal or a job
            signal.signal(number, signal.SIG_IGN)
        end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return begin
