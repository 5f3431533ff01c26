"""Evaluate: `python -m megatron_cord.evaluate --config FILE [a.b=value …]`, alone or under torchrun on any layout.

Weights: `evaluation.checkpoint`. Questions: `data.evaluation`, `evaluation.sets`, or both. A plain Hugging Face
checkpoint needs no training run:
name it as model.checkpoint, with evaluation.checkpoint=base. `output_dir/evaluations/LABEL/` gets the answers to each
set, each set's result, and results.json, results.md and results.html with intervals and comparisons. An evaluation
that was killed, or stopped by Ctrl-C or a signal (exit status 75), continues where it was. Exit status 4 where an
accuracy has dropped beyond the limit of one of `evaluation.guards`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.sets import open_evaluation
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import FOLDER
from megatron_cord.evaluation.formats import judged_sets, load_set, shard_questions
from megatron_cord.evaluation.pages import tables
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.parallel.layout import Layout, finalize, initialize
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.reward import Judge
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.types import RolloutEngine
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime import entry
from megatron_cord.runtime.exit_status import BEYOND_GUARD, STOPPED
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.runtime.progress import Bars
from megatron_cord.runtime.stop_request import StopRequest
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.model_setup import build_saved

logger = logging.getLogger("megatron_cord.evaluate")  # also where this page is __main__


def evaluate(config: RunConfig) -> dict[str, Any] | None:
    """Evaluate on this rank together with the others.

    Returns:
        the content of results.json, on each of them; None if a signal stopped the evaluation, with its answers kept.
    """
    if not config.data.evaluation and not config.evaluation.sets:
        raise CordError("there are no questions: set data.evaluation to a directory of shards, or evaluation.sets")
    layout = initialize(config.parallel, config.seed)
    console = Console(quiet=not layout.is_main)
    prompts = PromptBuilder(config.model.checkpoint, long_audio=config.data.long_audio, features=config.data.features)
    evaluator = _evaluator(config, prompts, layout)
    evaluator.check_guards()
    engine = build_engine(config.rollout, config.model.checkpoint, layout.device, config.model.torch_dtype, prompts)
    result = None
    with StopRequest("the questions in progress are answered and kept") as request:
        answered = _answer_all(config, layout, evaluator, engine, lambda: any_rank([bool(request)], layout.device)[0])
    if answered is None:
        logger.info("asked to stop: the answers so far are kept; the same command continues")
    else:
        label, step = answered
        result = evaluator.compare(label, step, _baseline(config, label))
        for table in result_tables(result):
            console.print(table)
        page = evaluator.directory(label) / "results.html"
        console.print(f"written to {page}, and .md and .json", highlight=False, soft_wrap=True)
    engine.close()
    finalize()
    return result


def _answer_all(
    config: RunConfig, layout: Layout, evaluator: Evaluator, engine: RolloutEngine, stop: Callable[[], bool]
) -> tuple[str, int] | None:
    """Answer with the baseline, where it is evaluated too, and with the model; return its label and step.

    None if it was asked to stop before.
    """
    if config.evaluation.baseline == "base" and config.evaluation.checkpoint != "base":
        base = _identity(config, checkpoint_directory(config.model.checkpoint))
        with _progress(layout, "base") as progress:
            if not evaluator.answer("base", base, engine, progress, stop):
                return None
    label, model, step = load_evaluated(config, layout, engine)
    with _progress(layout, label) as progress:
        return (label, step) if evaluator.answer(label, model, engine, progress, stop) else None


def _evaluator(config: RunConfig, prompts: PromptBuilder, layout: Layout) -> Evaluator:
    output = Path(config.output_dir)
    ready = config.reward.judge.is_given
    judged = judged_sets(config.evaluation.sets)
    if judged and not ready:
        name, given = next(iter(judged.items()))
        raise CordError(
            f"evaluation.sets.{name} (format {given.format}) is scored by a judge; set reward.judge.base_url and "
            "reward.judge.model, or leave the set out"
        )
    sets = {name: load_set(given) for name, given in config.evaluation.sets.items()}
    if config.data.evaluation:
        shards = open_evaluation(config.data, prompts.limits)
        sets[HELDOUT] = shard_questions(shards, config.evaluation.samples)
    compares = config.evaluation.comparer == "judge"
    if compares and not ready:
        raise CordError("evaluation.comparer=judge needs reward.judge.base_url and reward.judge.model")
    needed = layout.is_main and (compares or bool(judged))
    judge = Judge(config.reward.judge, output / FOLDER / "judge_cache") if needed else None
    comparer = judge if compares else None
    return Evaluator(config.evaluation, sets, prompts, output, comparer=comparer, judge=judge, writes=layout.is_main)


def _baseline(config: RunConfig, label: str) -> Path | None:
    """Return the directory of the evaluation to compare with."""
    named = config.evaluation.baseline
    if named is None or (named == "base" and label == "base"):
        return None
    return Path(config.output_dir) / FOLDER / "base" if named == "base" else Path(named)


def load_evaluated(config: RunConfig, layout: Layout, engine: RolloutEngine) -> tuple[str, str, int]:
    """Give the engine the weights to evaluate; return the label, `_identity` of the model, and the step.

    Raises:
        CordError: there is no such checkpoint.
    """
    named = config.evaluation.checkpoint
    if named == "base":
        return "base", _identity(config, checkpoint_directory(config.model.checkpoint)), 0
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.checkpoint)
    path: Path | None = Path(named)
    if named == "latest":
        path = checkpoints.newest()
    elif named == "best":
        record = broadcast_json(checkpoints.best())
        if record is None:
            raise CordError(
                f"{checkpoints.directory} holds no best checkpoint: checkpoint.best was false, or there was no "
                "evaluation yet; take evaluation.checkpoint=latest"
            )
        path = checkpoints.path_of(record["step"])
    if path is None:
        raise CordError(
            f"{checkpoints.directory} holds no checkpoint; train first, or evaluate the original model with "
            "evaluation.checkpoint=base"
        )
    model, step = build_saved(path, config.model, layout)
    engine.update_weights(ShardedModelWeights(model), step)
    return path.resolve().name, _identity(config, path), step


def _identity(config: RunConfig, checkpoint: Path) -> str:
    """Return what answers depend on beside their questions: the weights, and the precision of the local engine."""
    weights = checkpoint_fingerprint(checkpoint)
    return f"{weights} in {config.model.dtype}" if config.rollout.engine == "local" else weights


@contextmanager
def _progress(layout: Layout, label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each set."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, enabled=layout.is_main) as bars:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"{label}: {name}", total=total)
            bars.update(tasks[name], advance=done)

        yield progress


def result_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of a result for the terminal."""
    for title, head, lines in tables(result):
        table = Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name)
        for line in lines:
            table.add_row(*line)
        yield table


def exit_status(result: dict[str, Any] | None) -> int:
    """Return the exit status of what `evaluate` returned."""
    if result is None:
        return STOPPED
    return BEYOND_GUARD if any(guard["held"] is False for guard in result["guards"].values()) else 0


def main() -> int:
    """Run the command and return its exit status."""
    arguments = entry.parse_args(__doc__.splitlines()[0])
    return exit_status(evaluate(load_config(RunConfig, arguments.config, arguments.overrides)))


if __name__ == "__main__":
    entry.run(main)
