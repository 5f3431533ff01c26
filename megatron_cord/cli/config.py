"""``cord config``: what a key means, and what a file sets."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cord.cli.options import FILE, overrides_argument


class KeyGroup(click.Group):
    """A group whose first argument may be a key or a section in the place of a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take anything but a command's name for the argument of `explain`."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["explain", *args])


@click.group(
    cls=KeyGroup,
    no_args_is_help=True,
    subcommand_metavar="KEY | SECTION | check FILE [a.b=value]... | parameters FILE [a.b=value]...",
)
def command() -> None:
    """Explain the keys of the configuration, and check a file.

    `cord config optimizer.learning_rate` explains one key: type, default, meaning and the dataclass that declares it;
    `cord config rollout` the keys of a section; `cord config check FILE` what a run would use, without starting it;
    `cord config parameters FILE` the names of the parameters that it trains, and their learning rates.
    """


@command.command
@click.argument("key")
def explain(key: str) -> None:
    """Explain a key or the keys of a section (the word `explain` may be left out)."""
    from megatron_cord.cli.actions.config import explain_key

    explain_key(key)


@command.command
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--all", "show_all", is_flag=True, help="Print the whole configuration, defaults included, as YAML.")
@overrides_argument
def check(file: Path, show_all: bool, overrides: tuple[str, ...]) -> int:
    """Print what a run would use: values that differ from the defaults, and warnings."""
    from megatron_cord.cli.actions.config import check_file

    return check_file(file, overrides, show_all=show_all)


@command.command
@click.argument("file", metavar="FILE", type=FILE)
@overrides_argument
def parameters(file: Path, overrides: tuple[str, ...]) -> int:
    """Print the parameters that a run trains, by the groups of optimizer.groups, with their rates and sizes."""
    from megatron_cord.cli.actions.parameters import list_parameters

    return list_parameters(file, overrides)
