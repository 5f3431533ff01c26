"""Speak written questions as webdataset shards, or project what that would take."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.errors import CordError
from megatron_cord.runtime.progress import Bars
from megatron_cord.speech.estimate import estimate
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set


class RateColumn(ProgressColumn):
    """Utterances a second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        return Text(f"{task.speed or 0.0:.0f}/s")


def synthesize(config: SpokenSetConfig, output: Path | None, *, workers: int, planned: int | None) -> None:
    """Speak the questions into `output`, or `planned` of them for a projection, and print the outcome."""
    if workers < 1:
        raise CordError(f"--workers is {workers}; give at least 1")
    if planned is None and output is None:
        raise CordError("--output DIR is needed, for the shards")
    columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Bars(*columns) as bar:
        if planned is not None:
            outcome = estimate(config, planned, workers=workers).describe()
        else:
            task = bar.add_task("speaking", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, total=total, advance=done)

            assert output is not None
            result = make_spoken_set(config, output, workers=workers, progress=progress)
            rejects = [f"{count} left out: {reason}" for reason, count in result.rejects.items()]
            outcome = "\n".join([_describe(result.manifest), *rejects])
    Console().print(f"{output or config.questions}: {outcome}", highlight=False, markup=False, soft_wrap=True)


def _describe(manifest: Manifest) -> str:
    time = f"{manifest.seconds:.0f} s" if manifest.seconds < 7200 else f"{manifest.seconds / 3600:.1f} h"
    return (
        f"{manifest.samples} utterances, {time} of speech, {len(manifest.voices)} voices, {len(manifest.shards)} shards"
    )
