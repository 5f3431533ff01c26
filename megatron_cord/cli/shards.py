"""``cord shards``: directories of shards, checked and described."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import DIRECTORY


@click.group
def command() -> None:
    """Check and describe shards of samples.

    Shards are webdataset tar files with {id}.wav and {id}.json; `cord synthesize` makes them from written questions.
    """


@command.command
@click.argument("path", metavar="DIR", type=DIRECTORY)
@click.option("--digests/--no-digests", default=True, show_default=True, help="Compare SHA-256 with the manifest's.")
def check(path: Path, digests: bool) -> int:
    """Read every sample, print what cannot be used, and exit with status 1 if there is any."""
    from megatron_cord.cli.actions.shards import check_shards

    return check_shards(path, digests=digests)


@command.command
@click.argument("path", metavar="DIR", type=DIRECTORY)
def info(path: Path) -> int:
    """Describe a directory of shards: samples, hours, voices, lengths and how it was made."""
    from megatron_cord.cli.actions.shards import describe_shards

    return describe_shards(path)
