"""``cord verify``: checks of an installation."""

from __future__ import annotations

import click

from megatron_cord.cli.options import overrides_argument

SUBJECTS = ("environment", "loss", "layout", "weight_sync")


@click.command
@click.argument("subject", type=click.Choice(SUBJECTS), metavar=f"{{{'|'.join(SUBJECTS)}}}")
@overrides_argument
def command(subject: str, overrides: tuple[str, ...]) -> int:
    """Check an installation.

    environment: packages and devices. loss: divergence and gradients against float64. layout: one step under a layout
    against one rank. weight_sync: every transport against a running server. Under a launcher:
    python -m megatron_cord.launch --nproc-per-node 2 -m megatron_cord.verify layout parallel.tp=2.
    """
    from megatron_cord.verify.__main__ import SUBJECTS as SUBJECT_FUNCTIONS

    return SUBJECT_FUNCTIONS[subject](overrides)
