"""Run a comparison and write its tables and charts."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from megatron_cord.compare import tables
from megatron_cord.compare.chart import draw
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.finished import finished_runs, group_runs
from megatron_cord.compare.kept import read_finished
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.compare.results import gather
from megatron_cord.compare.running import Listener, Outcome, Runner
from megatron_cord.config.loading import load_config
from megatron_cord.runtime.exit_status import STOPPED, USER_ERROR
from megatron_cord.runtime.files import write_atomic
from megatron_cord.runtime.progress import Bars

logger = logging.getLogger(__name__)


class Terminal(Listener):
    """A line for each run that ends and, on a terminal, a bar for each that is in flight."""

    def __init__(self, runs: int) -> None:
        self._runs, self._done = runs, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Bars(*columns)
        self._all = self.bar.add_task("runs", total=runs)
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def prepares(self, seed: int) -> None:
        """Log the seed."""
        logger.info("seed %d: data and checkpoint", seed)

    def started(self, run: PlannedRun) -> None:
        """Show a bar."""
        self._tasks[run.name] = self.bar.add_task(run.name, total=run.config.train.steps), time.perf_counter()

    def stepped(self, run: PlannedRun, steps: int) -> None:
        """Move the bar."""
        self.bar.update(self._tasks[run.name][0], completed=steps)

    def ended(self, outcome: Outcome) -> None:
        """Remove the bar and log the outcome."""
        self._done += 1
        task, begun = self._tasks.pop(outcome.run.name, (None, time.perf_counter()))
        if task is not None:
            self.bar.remove_task(task)
        self.bar.update(self._all, completed=self._done)
        ended = _describe(outcome, time.perf_counter() - begun)
        logger.info("%d/%d %s: %s", self._done, self._runs, outcome.run.name, ended)


def _describe(outcome: Outcome, seconds: float) -> str:
    if outcome.failure is not None:
        return f"failed: {outcome.failure}"
    summary = read_finished(outcome.run).summary
    before, after, closed = (summary[name] for name in ("audio_accuracy_before", "audio_accuracy_after", "gap_closed"))
    gap = "there was no gap" if closed is None else f"{closed:.0%} of the gap closed"
    return f"audio accuracy {before:.1%} → {after:.1%}, {gap}, {'was there' if outcome.found else f'{seconds:.0f} s'}"


def write(result: dict[str, Any], config: CompareConfig) -> None:
    """Write the outcome as JSON, Markdown and drawings, and into a page of the user's, each text whole."""
    path, chart = config.results_path, config.chart_path
    if path is None or chart is None:
        return
    texts = {
        path.with_name(f"{path.name}.json"): json.dumps(result, indent=1) + "\n",
        path.with_name(f"{path.name}.md"): tables.page(result),
    }
    if config.page:
        page = Path(config.page)
        link = Path(os.path.relpath(f"{chart}.svg", page.parent)).as_posix()
        texts[page] = tables.insert(page.read_text(encoding="utf-8"), path.name, result, link)
    for target, text in texts.items():
        write_atomic(target, text)
    draw(result, [chart.with_name(chart.name + suffix) for suffix in (".svg", ".png")])


def compare(config_file: Path | None, arguments: Sequence[str]) -> int:
    """Run what is missing of a comparison, write and print its tables; return the exit status.

    Args:
        config_file: of the comparison.
        arguments: directories of finished runs, and overrides.
    """
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).is_dir()]
    if directories := [Path(argument) for argument in arguments if argument not in overrides]:
        overrides.append(f"runs={json.dumps(group_runs(directories), ensure_ascii=False)}")
    config = load_config(CompareConfig, config_file, overrides)
    runs, finished = plan_runs(config), finished_runs(config.runs)
    if config.page and config.results_path is not None:
        # Refuse now what would be refused at the end.
        tables.around(Path(config.page).read_text(encoding="utf-8"), config.results_path.name)
    listener = Terminal(len(runs))
    with listener.bar, Runner(config, runs, listener) as runner:
        outcomes = runner.run()
    if runner.stopped:  # half a comparison does not replace a whole one
        config = replace(config, results="", chart="", page="")
    result = gather(config, [*outcomes, *(Outcome(run, found=True) for run in finished)])
    write(result, config)
    print(tables.page(result))
    if config.results_path is not None:
        print(f"written: {config.results_path}.json and .md, {config.chart_path}.svg and .png")
    if runner.stopped:
        print(f"stopped with {len(outcomes)} of {len(runs)} runs done; the same command continues")
        return STOPPED
    return USER_ERROR if any(outcome.failure for outcome in outcomes) else 0
