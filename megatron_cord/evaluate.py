"""Evaluates: `python -m megatron_cord.evaluate --config FILE [a.b=value …]`, alone or under torchrun on any layout.

Which weights: `evaluation.checkpoint`; which questions: `data.evaluation`, `evaluation.sets`, or both. A plain Hugging Face checkpoint needs no
training run: name it as model.checkpoint, with evaluation.checkpoint=base. In output_dir:

- `evaluations/step_….json`: accuracies on data.evaluation as a training run writes them, which the run's report shows;
- `evaluations/LABEL/`: the answers to each of the sets, and results.json, results.md and results.html with intervals and comparisons. A killed
  evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.evaluation.pages import tables
from megatron_cord.evaluation.suite import Suite
from megatron_cord.parallel.layout import Layout, finalize, initialize
from megatron_cord.reward import Judge
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.types import RolloutEngine
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime import entry
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints, load_weights
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.evaluation import Evaluator, write_evaluation
from megatron_cord.trainer.model_setup import build_student


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluates on this rank together with the others.

    Returns:
        on each of them the result on data.evaluation, if there is one; under "suite" that on the sets.
    """
    if not config.data.evaluation and not config.evaluation.sets:
        raise CordError("there is nothing to ask: set data.evaluation to a directory of shards, or evaluation.sets")
    layout = initialize(config.parallel, config.seed)
    console = Console(quiet=not layout.is_main)
    prompts = PromptBuilder(config.model.checkpoint, long_audio=config.data.long_audio, features=config.data.features)
    suite = _suite(config, prompts, layout)
    engine = build_engine(config.rollout, config.model.checkpoint, layout.device)
    if suite is not None and config.evaluation.baseline == "base" and config.evaluation.checkpoint != "base":
        with _progress(console, "base") as progress:
            suite.answer("base", _fingerprint(Path(config.model.checkpoint)), engine, progress)
    label, model, step = _load(config, layout, engine)
    result: dict[str, Any] = {}
    if config.data.evaluation:
        source = config.data.open("evaluation", prompts.longest_clip)
        samples = [source[i] for i in range(min(config.evaluation.samples or len(source), len(source)))]
        result = Evaluator(config.evaluation, samples, prompts, engine).run(step)
        if layout.is_main:
            path = write_evaluation(Path(config.output_dir), result)
            console.print(accuracy_table(result))
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
    if suite is not None:
        with _progress(console, label) as progress:
            suite.answer(label, model, engine, progress)
        result = result | {"suite": suite.finish(label, _baseline(config, label))}
        for table in suite_tables(result["suite"]):
            console.print(table)
        console.print(
            f"written to {suite.directory(label) / 'results.html'}, and .md and .json", highlight=False, soft_wrap=True
        )
    engine.close()
    finalize()
    return result


def _suite(config: RunConfig, prompts: PromptBuilder, layout: Layout) -> Suite | None:
    if not config.evaluation.sets:
        return None
    directory = Path(config.output_dir) / "evaluations"
    judge = None
    if config.evaluation.comparer == "judge":
        if not (config.reward.judge.base_url and config.reward.judge.model):
            raise CordError("evaluation.comparer=judge needs reward.judge.base_url and reward.judge.model")
        judge = Judge(config.reward.judge, directory / "judge_cache") if layout.is_main else None
    return Suite(config.evaluation, prompts, directory, comparer=judge, writes=layout.is_main)


def _baseline(config: RunConfig, label: str) -> Path | None:
    """The directory of the evaluation to compare with."""
    named = config.evaluation.baseline
    if named is None or (named == "base" and label == "base"):
        return None
    return Path(config.output_dir) / "evaluations" / "base" if named == "base" else Path(named)


def _load(config: RunConfig, layout: Layout, engine: RolloutEngine) -> tuple[str, str, int]:
    """Gives the engine the weights to evaluate; returns the evaluation's name, what stands for the weights, and their step."""
    named = config.evaluation.checkpoint
    if named == "base":
        return "base", _fingerprint(Path(config.model.checkpoint)), 0
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.checkpoint)
    path = checkpoints.newest() if named == "latest" else Path(named)
    if path is None:
        raise CordError(
            f"{checkpoints.directory} holds no checkpoint; train first, or evaluate the start with evaluation.checkpoint=base"
        )
    model = build_student(replace(config.model, freeze=()), layout)  # all weights: the checkpoint may be of another run
    step = load_weights(path, model)
    engine.update_weights(ShardedModelWeights(model), step)
    return path.resolve().name, _fingerprint(path), step


def _fingerprint(checkpoint: Path) -> str:
    """16 hexadecimal digits for the weights: names and sizes of a checkpoint's files, and of each the first and the last megabyte."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in checkpoint.iterdir() if p.suffix in {".safetensors", ".distcp", ".json", ".metadata"}
    ):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


@contextmanager
def _progress(console: Console, label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a set."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"{label}: {name}", total=total)
            bars.update(tasks[name], advance=done)

        yield progress


def accuracy_table(result: dict[str, Any]) -> Table:
    """One evaluation for the terminal."""
    table = Table(title=f"Step {result['step']}, {result['samples']} held-out questions", title_justify="left")
    for name in ("", "questions", "text", "audio", "gap"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in {"all": result, **result["voices"]}.items():
        cells = [f"{row[key]:.1%}" for key in ("text_accuracy", "audio_accuracy", "gap")]
        table.add_row(name, str(row["samples"]), *cells, end_section=name == "all")
    return table


def suite_tables(result: dict[str, Any]) -> Iterator[Table]:
    """The sets for the terminal."""
    for title, head, lines in tables(result):
        table = Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name)
        for line in lines:
            table.add_row(*line)
        yield table


def main() -> None:
    """Entry point."""
    arguments = entry.parse_args(__doc__.splitlines()[0])
    evaluate(load_config(RunConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    entry.run(main)
