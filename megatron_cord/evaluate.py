"""Evaluates: `python -m megatron_cord.evaluate --config FILE [a.b=value …]`, alone or under torchrun on any layout.

Accuracy reading and hearing, their gap, and both by voice, of the checkpoint that `evaluation.checkpoint` names. Writes
`evaluations/step_….json` in output_dir, for `base` into the same place as a training run's first evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cord import cli
from megatron_cord.config import load_config
from megatron_cord.convert import export_tensors
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.shards import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout, finalize, initialize
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.local import LocalEngine, LocalEngineConfig
from megatron_cord.trainer.checkpoint import Checkpoints, load_weights
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.evaluation import Evaluator, write_evaluation
from megatron_cord.trainer.model_setup import build_student


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluates on this rank together with the others; returns the result on each."""
    layout = initialize(config.parallel, config.seed)
    engine = CollectiveEngine(LocalEngine(config.model.checkpoint, LocalEngineConfig(device=str(layout.device))))
    step = _load(config, layout, engine)
    source = ShardDataset(config.data.evaluation)
    samples = [source[i] for i in range(min(config.evaluation.samples or len(source), len(source)))]
    prompts = PromptBuilder(config.model.checkpoint, long_audio=config.data.long_audio)
    result = Evaluator(config.evaluation, samples, prompts, engine).run(step)
    if layout.is_main:
        path = write_evaluation(Path(config.output_dir), result)
        console = Console()
        console.print(accuracy_table(result))
        console.print(f"written to {path}", highlight=False, soft_wrap=True)
    engine.close()
    finalize()
    return result


def _load(config: RunConfig, layout: Layout, engine: CollectiveEngine) -> int:
    """Gives the engine the weights to evaluate; returns their step."""
    named = config.evaluation.checkpoint
    if named == "base":
        return 0
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.checkpoint)
    path = checkpoints.newest() if named == "latest" else Path(named)
    if path is None:
        raise CordError(f"{checkpoints.directory} holds no checkpoint; train first, or evaluate the start with evaluation.checkpoint=base")
    model = build_student(config.model, layout)
    step = load_weights(path, model)
    engine.update_weights(export_tensors(model), step)
    return step


def accuracy_table(result: dict[str, Any]) -> Table:
    """One evaluation for the terminal."""
    table = Table(title=f"Step {result['step']}, {result['samples']} held-out questions", title_justify="left")
    for name in ("", "questions", "text", "audio", "gap"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in {"all": result, **result["voices"]}.items():
        cells = [f"{row[key]:.1%}" for key in ("text_accuracy", "audio_accuracy", "gap")]
        table.add_row(name, str(row["samples"]), *cells, end_section=name == "all")
    return table


def main() -> None:
    """Entry point."""
    arguments = cli.parse_args(__doc__.splitlines()[0])
    evaluate(load_config(RunConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    cli.run(main)
