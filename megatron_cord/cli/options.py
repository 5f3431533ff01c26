"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
DIRECTORY = click.Path(path_type=Path)


def config_option(*, required: bool) -> Callable[[Function], Function]:
    """Add ``--config FILE``."""
    return click.option("--config", metavar="FILE", type=FILE, required=required, help="YAML configuration.")


def overrides_argument(function: Function) -> Function:
    """Add ``[a.b=value …]``."""
    return click.argument("overrides", metavar="[a.b=value]...", nargs=-1)(function)


def ranks_option(function: Function) -> Function:
    """Add ``--nproc-per-node N``."""
    return click.option(
        "--nproc-per-node",
        metavar="N",
        type=click.IntRange(min=1),
        help="Start N ranks on this machine. Several machines: python -m megatron_cord.launch, as torchrun.",
    )(function)


def launch_ranks(count: int, module: str, config: Path, overrides: tuple[str, ...]) -> int:
    """Run an entry point on `count` ranks of this machine and return the exit status."""
    from megatron_cord.launch import launch

    options = ["--standalone", "--nproc-per-node", str(count), "-m", module]
    return launch([*options, "--config", str(config), *overrides])


def spread_values(args: Sequence[str], names: Collection[str]) -> list[str]:
    """Repeat an option before each of the values that follow it, as click reads several, for the options `names`."""
    spread: list[str] = []
    option = None
    for word in args:
        if word.startswith("-"):
            option = word if word in names else None
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(word)
    return spread
