"""Metrics of a run: a progress bar or lines on the terminal, `metrics.jsonl`, and TensorBoard. One rank writes."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter


class _Rate(ProgressColumn):
    """Steps a second of this process."""

    def render(self, task: RichTask) -> Text:
        return Text("" if not task.speed else f"{task.speed:.2f} steps/s", style="dim")


class MetricsLog:
    """Writes each step's metrics; a context manager.

    Args:
        directory: of the run.
        steps: of the whole run, for the progress bar.
        first_step: steps already made; lines of later ones, left by a run that was stopped, are dropped.
        enabled: False on ranks that do not speak.
    """

    def __init__(self, directory: Path, steps: int, first_step: int, *, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self.path = directory / "metrics.jsonl"
        _drop_after(self.path, first_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._console = Console(stderr=True)
        columns = [
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=steps, completed=first_step, note="")
        self._steps, self._first, self._begun = steps, first_step, time.perf_counter()
        self._last_line = -math.inf

    def __enter__(self) -> Self:
        self._excepthook = threading.excepthook
        if self._enabled:
            self._bar.start()
            threading.excepthook = self._thread_failed
        return self

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread passes a full disk on to whoever writes next; its own traceback would run into the line that says so."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        threading.excepthook = self._excepthook
        if self._enabled:
            self._bar.stop()
            self._file.close()
            self._board.close()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of the step numbered from 1."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step} | {k: json_float(v) for k, v in metrics.items()}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if not isinstance(value, bool) and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        note = f"loss {metrics['loss']:.4f}  kl {metrics['kl']:.4f}" + (f"  reward {metrics['reward']:.2f}" if "reward" in metrics else "")
        self._bar.update(self._task, completed=step, note=note)
        if not self._console.is_terminal:
            self._line(step, note)

    def evaluation(self, step: int, accuracies: dict[str, float]) -> None:
        """Writes an evaluation's accuracies to TensorBoard and the terminal."""
        if not self._enabled:
            return
        for name, value in accuracies.items():
            self._board.add_scalar(f"evaluation/{name}", value, step)
        self.say(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in accuracies.items()))

    def say(self, message: str) -> None:
        """A line that scrolls above the progress bar."""
        if self._enabled:
            self._console.print(message, highlight=False)

    def _line(self, step: int, note: str) -> None:
        """Where no bar can be drawn (a log file), a line every ten seconds and at the end."""
        now = time.perf_counter()
        if now - self._last_line >= 10 or step == self._steps:
            self._last_line = now
            rate = (step - self._first) / (now - self._begun)
            left = (self._steps - step) / rate
            print(
                f"step {step}/{self._steps}  {rate:.2f} steps/s  {int(left // 60)}:{int(left % 60):02d} left  {note}",
                file=sys.stderr,
                flush=True,
            )


class Stopwatch:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = time.perf_counter()
        self.times[f"seconds_{phase}"] = now - self._last
        self._last = now

    def total(self) -> dict[str, float]:
        """All phases, and the sum as `seconds`."""
        return self.times | {"seconds": time.perf_counter() - self._begun}


def json_float(value: Any) -> Any:
    """JSON has no NaN or infinity; null says that nothing was measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_floats(values: Sequence[float]) -> list[float | None]:
    """The same for each of several."""
    return [json_float(value) for value in values]


def _drop_after(path: Path, last_step: int) -> None:
    """Keeps the lines of steps up to last_step; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
