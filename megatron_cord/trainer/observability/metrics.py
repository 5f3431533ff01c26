"""Metrics of a run: progress on the terminal, `metrics.jsonl`, trackers, and alerts in words. One rank writes."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from megatron_cord.evaluation.guards import Drop
from megatron_cord.runtime.files import write_atomic
from megatron_cord.runtime.progress import Bars
from megatron_cord.trainer.observability.alerts import AlertConfig, find_alerts
from megatron_cord.trainer.observability.trackers.config import MetricsConfig
from megatron_cord.trainer.observability.trackers.opening import open_trackers
from megatron_cord.trainer.observability.trackers.tags import tag

logger = logging.getLogger(__name__)


class _Rate(ProgressColumn):
    """Steps a second of this process."""

    def render(self, task: RichTask) -> Text:
        return Text("" if not task.speed else f"{task.speed:.2f} steps/s", style="dim")


class MetricsLog:
    """Writes each step's metrics, and logs when they look wrong (`alerts.jsonl`, the terminal); a context manager.

    Args:
        directory: of the run.
        steps: of the whole run, for the progress bar.
        first_step: steps already made; lines of later ones, left by a run that was stopped, are dropped.
        config: where else metrics go.
        alerts: when something looks wrong.
        evaluations: those already made, ascending, as `find_alerts` takes them.
        settings: the run's configuration as plain maps, without secrets, for trackers that keep it.
        enabled: False on ranks that do not speak.
    """

    def __init__(
        self,
        directory: Path,
        steps: int,
        first_step: int,
        config: MetricsConfig | None = None,
        alerts: AlertConfig | None = None,
        *,
        evaluations: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self.path, self._alerts_path = directory / "metrics.jsonl", directory / "alerts.jsonl"
        self._rows, self._evaluations, self._alerts = (
            _keep_until(self.path, first_step),
            list(evaluations),
            alerts or AlertConfig(),
        )
        self._said = {alert.get("kind") for alert in _keep_until(self._alerts_path, first_step)}
        self._file = self.path.open("a")
        self._trackers = open_trackers(config or MetricsConfig(), directory, first_step, settings or {})
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
        self._bar = Bars(*columns)
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
        """Silence a full disk in TensorBoard's thread, which the next write reports without a traceback."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._excepthook
        if self._enabled:
            self._bar.stop()
            self._file.close()
            for tracker in self._trackers:
                tracker.close(failed=kind is not None)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of the step numbered from 1."""
        if not self._enabled:
            return
        row = {"step": step} | {k: json_float(v) for k, v in metrics.items()}
        self._rows.append(row)
        row["alerts"] = self._watch(step)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        scalars = {k: v for k, v in row.items() if k != "step" and v is not None and not isinstance(v, bool)}
        self._track(step, {tag(name): value for name, value in scalars.items()})
        digits = {"loss": 4, "kl": 4, "reward": 2}
        note = "  ".join(
            f"{name} {metrics[name]:.{n}f}"
            for name, n in digits.items()
            if name in metrics and not math.isnan(metrics[name])
        )
        self._bar.update(self._task, completed=step, note=note)
        if self._bar.disable:
            self._line(step, note)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """Write an evaluation's accuracies to the trackers and the terminal."""
        if not self._enabled:
            return
        step, accuracies = result["step"], {name: result[name] for name in ("text_accuracy", "audio_accuracy")}
        self._track(step, {f"evaluation/{name}": value for name, value in accuracies.items()})
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in accuracies.items())
        logger.info("step %d: %s", step, shown)
        self._evaluations = [e for e in self._evaluations if e["step"] < step] + [
            {"step": step, "samples": result["samples"], **accuracies}
        ]
        self._watch(step)

    def question_set(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Write the accuracies on a set beside data.evaluation; one that has no text or no audio has but the other."""
        if not self._enabled:
            return
        given = {key: result.get(key) for key in ("text_accuracy", "audio_accuracy")}
        accuracies = {key: value for key, value in given.items() if value is not None}
        self._track(step, {f"evaluation/{name}/{key}": value for key, value in accuracies.items()})
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in accuracies.items())
        logger.info("step %d: %s: %s", step, name, shown)

    def guard(self, step: int, name: str, drop: Drop, warning: str | None) -> None:
        """Write what a guard measured to the trackers; log a warning, the first of a run as an alert, too."""
        if not self._enabled:
            return
        values = {key: getattr(drop, key) for key in ("accuracy", "drop", "low", "high")}
        self._track(step, {f"guard/{name}/{key}": value for key, value in values.items()})
        if warning is None:
            logger.info("step %d: guard %s: dropped by %s", step, name, drop)
            return
        logger.warning("step %d: guard %s: %s", step, name, warning)
        kind = f"guard {name}"
        if kind not in self._said:
            self._said.add(kind)
            self._write_alert(step, kind, warning)

    def _write_alert(self, step: int, kind: str, words: str) -> None:
        with self._alerts_path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "words": words}) + "\n")

    def _track(self, step: int, scalars: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def _watch(self, step: int) -> int:
        """Log what looks wrong, each kind once a run; return how many alerts hold."""
        found = find_alerts(self._rows, self._evaluations, self._alerts)
        for alert in found:
            if alert.kind not in self._said:
                self._said.add(alert.kind)
                self._write_alert(step, alert.kind, alert.words)
                logger.warning("alert at step %d: %s: %s", step, alert.kind, alert.words)
        return len(found)

    def _line(self, step: int, note: str) -> None:
        """Where no bar can be drawn (a log file), a line every ten seconds and at the end."""
        now = time.perf_counter()
        if now - self._last_line >= 10 or step == self._steps:
            self._last_line = now
            rate = (step - self._first) / (now - self._begun)
            left = (self._steps - step) / rate
            logger.info(
                "step %d/%d  %.2f steps/s  %d:%02d left  %s", step, self._steps, rate, left // 60, left % 60, note
            )


class Stopwatch:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.times[f"seconds_{phase}"] = now - self._last
        self._last = now

    def total(self) -> dict[str, float]:
        """Return all phases, and the sum as `seconds`."""
        return self.times | {"seconds": time.perf_counter() - self._begun}


def json_float(value: Any) -> Any:
    """Return a value as JSON has it: without NaN or infinity, which become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_floats(values: Sequence[float]) -> list[float | None]:
    """Do the same for each of several."""
    return [json_float(value) for value in values]


def _keep_until(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the lines of steps up to last_step, and return their content; a half-written last line is dropped."""
    if not path.exists():
        return []
    kept, rows = [], []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= last_step:
                kept.append(line + "\n")
                rows.append(row)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomic(path, "".join(kept))
    return rows
