"""``cord plan``: memory and speed of a run before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from megatron_cord.cli.options import config_option, overrides_argument

GPUS = ("a100", "b200", "h100", "h200")


@click.command
@config_option(required=True)
@click.option(
    "--gpus", metavar="N[,N…]", default="8", show_default=True, help="GPUs that train; several numbers with --trace."
)
@click.option(
    "--rollout-gpus",
    metavar="N",
    type=int,
    default=0,
    show_default=True,
    help="GPUs that run rollout servers; 0 shares the trainer's.",
)
@click.option("--gpu", type=click.Choice(GPUS), default="h100", show_default=True, help="Their type.")
@click.option("--model", metavar="NAME", help="A published model, if its checkpoint is not at hand.")
@click.option("--audio-seconds", type=float, default=10.0, show_default=True, help="Length of a question.")
@click.option("--text-tokens", type=int, default=60, show_default=True, help="Tokens of a question's text.")
@click.option("--layouts", is_flag=True, help="Print a Markdown table of common layouts instead.")
@click.option(
    "--trace",
    is_flag=True,
    help="Run a step's code without memory and arithmetic; count bytes, operations and collectives, and simulate it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@overrides_argument
def command(config: Path, overrides: tuple[str, ...], **options: Any) -> int:
    """Estimate whether a run fits and how fast it will be, before it starts.

    The model is that of model.checkpoint, or a published one by name. Exit status 1 if the run does not fit.
    """
    if options["trace"]:
        # Megatron decides at its import whether it has a GPU, which a trace does not use.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_cord.cli.actions.plan import plan

    return plan(config, overrides, **options)
