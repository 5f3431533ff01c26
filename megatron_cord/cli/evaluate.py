"""``cord evaluate``: accuracies of a checkpoint on one rank, or on several of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import config_option, launch_ranks, overrides_argument, ranks_option


@click.command
@config_option(required=True)
@ranks_option
@overrides_argument
def command(config: Path, nproc_per_node: int | None, overrides: tuple[str, ...]) -> int:
    """Evaluate a checkpoint.

    evaluation.checkpoint names the weights; data.evaluation and evaluation.sets the questions. Results are written to
    evaluations/ in output_dir. Ctrl-C keeps the answers so far (exit status 75), and the same command continues. Exit
    status 4 where an accuracy has dropped beyond the limit of one of evaluation.guards.
    """
    if nproc_per_node is not None:
        return launch_ranks(nproc_per_node, "megatron_cord.evaluate", config, overrides)
    from megatron_cord.config.loading import load_config
    from megatron_cord.evaluate import evaluate, exit_status
    from megatron_cord.trainer.config import RunConfig

    return exit_status(evaluate(load_config(RunConfig, config, overrides)))
