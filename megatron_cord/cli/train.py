"""``cord train``: the trainer on one rank, or on several of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import config_option, launch_ranks, overrides_argument, ranks_option


@click.command
@config_option(required=True)
@ranks_option
@overrides_argument
def command(config: Path, nproc_per_node: int | None, overrides: tuple[str, ...]) -> int:
    """Train a model.

    `cord config` describes the keys, `cord plan` estimates memory and time before a start. Ctrl-C and SIGTERM stop
    after the current step with a checkpoint (exit status 75), and the same command continues; a second Ctrl-C leaves at
    once (130).
    """
    if nproc_per_node is not None:
        return launch_ranks(nproc_per_node, "megatron_cord.train", config, overrides)
    from megatron_cord.train import train
    from megatron_cord.trainer.config import load_run_config

    return train(load_run_config(config, overrides))
