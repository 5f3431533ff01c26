"""What commands that make a set of shards have in common: a bar, and lines on what was made and what was left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_cord.errors import CordError
from megatron_cord.runtime.progress import Bars
from megatron_cord.speech.shard_set import ShardSet


class RateColumn(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        return Text(f"{task.speed or 0.0:.0f}/s")


def check_arguments(output: Path | None, workers: int, planned: int | None) -> None:
    """Refuse a command that lacks a directory or workers.

    Raises:
        CordError: it does.
    """
    if workers < 1:
        raise CordError(f"--workers is {workers}; give at least 1")
    if planned is None and output is None:
        raise CordError("--output DIR is needed, for the shards")


def show(label: str, where: Path | str, work: Callable[[Callable[[int, Any], None]], str]) -> None:
    """Do the work behind a progress bar, and print its outcome.

    Args:
        label: of the bar.
        where: the outcome is.
        work: returns it, given a function to call with (rows done since the last call, all rows or None).
    """
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Bars(*columns) as bar:
        task = bar.add_task(label, total=None, visible=False)

        def progress(done: int, total: int | None) -> None:
            bar.update(task, total=total, advance=done, visible=True)

        outcome = work(progress)
    Console().print(f"{where}: {outcome}", highlight=False, markup=False, soft_wrap=True)


def describe_set(made: ShardSet, what: str) -> str:
    """Return a line on a set, whose samples are `what`, and one for each reason why rows were left out."""
    manifest = made.manifest
    time = f"{manifest.seconds:.0f} s" if manifest.seconds < 7200 else f"{manifest.seconds / 3600:.1f} h"
    line = f"{manifest.samples} {what}, {time} of speech, {len(manifest.voices)} voices, {len(manifest.shards)} shards"
    return "\n".join([line, *(f"{count} left out: {reason}" for reason, count in made.rejects.items())])
