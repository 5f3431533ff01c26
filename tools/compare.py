"""Trains several methods on several seeds with one budget, and says which closed how much of the gap.

    python tools/compare.py --config examples/quickstart/compare.yaml [a.b=value …]
    python tools/compare.py train=CONFIG.yaml output_dir=runs/compare methods=[cord,sft,grpo] seeds=[0,1,2]

What is there is not made again, and a run that was stopped goes on; a run that fails is named, and the others go on (exit status 2). Settings are
the fields of `megatron_cord.compare.plan.CompareConfig`; methods are those of `megatron_cord.compare.methods`, and your own.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_cord.compare import tables
from megatron_cord.compare.chart import draw
from megatron_cord.compare.plan import CompareConfig, PlannedRun, plan_runs
from megatron_cord.compare.results import gather
from megatron_cord.compare.running import Listener, Outcome, Runner, read_summary
from megatron_cord.config.loading import load_config
from megatron_cord.runtime import entry, exit_status


class Terminal(Listener):
    """A line for each run that ends and, on a terminal, a bar for each that goes on."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._done = console, runs, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._all = self.bar.add_task("runs", total=runs)
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def prepares(self, seed: int) -> None:
        self._say(f"seed {seed}: data and checkpoint")

    def started(self, run: PlannedRun) -> None:
        self._tasks[run.name] = self.bar.add_task(run.name, total=run.config.train.steps), time.perf_counter()

    def stepped(self, run: PlannedRun, steps: int) -> None:
        self.bar.update(self._tasks[run.name][0], completed=steps)

    def ended(self, outcome: Outcome) -> None:
        self._done += 1
        task, begun = self._tasks.pop(outcome.run.name, (None, time.perf_counter()))
        if task is not None:
            self.bar.remove_task(task)
        self.bar.update(self._all, completed=self._done)
        self._say(f"{self._done}/{self._runs} {outcome.run.name}: {_told(outcome, time.perf_counter() - begun)}")

    def _say(self, line: str) -> None:
        self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _told(outcome: Outcome, seconds: float) -> str:
    if outcome.failure is not None:
        return f"failed: {outcome.failure}"
    summary = read_summary(outcome.run)
    before, after, closed = (summary[name] for name in ("audio_accuracy_before", "audio_accuracy_after", "gap_closed"))
    gap = "there was no gap" if closed is None else f"{closed:.0%} of the gap closed"
    return f"audio accuracy {before:.1%} → {after:.1%}, {gap}, {'was there' if outcome.found else f'{seconds:.0f} s'}"


def write(result: dict[str, Any], config: CompareConfig) -> None:
    """The outcome as JSON, Markdown and drawings, and in a page of the user's; each text is complete or as it was."""
    path, chart = config.results_path, config.chart_path
    texts = {
        path.with_name(f"{path.name}.json"): json.dumps(result, indent=1) + "\n",
        path.with_name(f"{path.name}.md"): tables.page(result),
    }
    if config.page:
        page = Path(config.page)
        link = Path(os.path.relpath(f"{chart}.svg", page.parent)).as_posix()
        texts[page] = tables.insert(page.read_text(encoding="utf-8"), path.name, result, link)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in texts.items():
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    draw(result, [chart.with_name(chart.name + suffix) for suffix in (".svg", ".png")])


def main() -> int:
    """Entry point."""
    arguments = entry.parse_args(__doc__.splitlines()[0], config_required=False)
    config = load_config(CompareConfig, arguments.config, arguments.overrides)
    runs = plan_runs(config)
    if config.page:
        tables.around(
            Path(config.page).read_text(encoding="utf-8"), config.results_path.name
        )  # refuse now what would be refused at the end
    console = Console()
    listener = Terminal(console, len(runs))
    with listener.bar, Runner(config, runs, listener) as runner:
        outcomes = runner.run()
    if runner.stopped:  # half a comparison does not replace a whole one
        config = replace(config, results="", chart="", page="")
    result = gather(config, outcomes)
    write(result, config)
    print(tables.page(result))
    print(f"written: {config.results_path}.json and .md, {config.chart_path}.svg and .png")
    if runner.stopped:
        print(f"asked to stop with {len(outcomes)} of {len(runs)} runs done; the same command goes on")
        return exit_status.STOPPED
    return exit_status.USER_ERROR if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    entry.run(main)
