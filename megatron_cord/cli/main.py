"""The console script ``cord``: commands loaded when they are named, one-line errors, the usual exit statuses.

Shell completion is click's: ``cord --install-completion`` writes it for the current shell, and
``eval "$(_CORD_COMPLETE=bash_source cord)"`` is the same for one session (``zsh_source``, ``fish_source``).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

import megatron_cord
from megatron_cord.cli.completion import install_completion
from megatron_cord.errors import CordError
from megatron_cord.runtime import entry
from megatron_cord.runtime.log import LEVEL_VARIABLE, LEVELS, configure_logging

COMMANDS = (
    "train", "evaluate", "verify", "convert", "shards", "synthesize", "graft", "warmup", "serve", "report", "compare",
    "plan", "config",
)  # fmt: skip


class CommandGroup(click.Group):
    """Commands that are imported when they are named: each is `command` in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of this name."""
        return load(cmd_name) if cmd_name in COMMANDS else None


def load(name: str) -> click.Command:
    """Import one command."""
    command: click.Command = importlib.import_module(f"megatron_cord.cli.{name}").command
    return command


def _set_level(ctx: click.Context, param: click.Parameter, level: str | None) -> None:
    if level:
        os.environ[LEVEL_VARIABLE] = level  # for ranks and servers that the command starts
        configure_logging(level)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(megatron_cord.__version__, prog_name="cord")
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    callback=_set_level,
    expose_value=False,
    help="Log lines to show (default: info, or MEGATRON_CORD_LOG_LEVEL).",
)
@click.option(
    "--install-completion",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=install_completion,
    help="Install completion for the current shell (bash, zsh or fish) and exit.",
)
def cord() -> None:
    """On-policy distillation of audio LLMs: train, evaluate, and everything around it.

    `cord COMMAND --help` describes one command, `cord config KEY` one key of the configuration.
    """


def invoke(command: click.Command, arguments: Sequence[str], prog: str) -> int:
    """Run a command and return its exit status.

    Raises:
        CordError: the command line is wrong.
        KeyboardInterrupt: a question was answered with Ctrl-C.
    """
    try:
        status: Any = command.main(list(arguments), prog_name=prog, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return 0
    except click.UsageError as error:
        message = error.format_message().rstrip(".").replace("\n", " ")
        raise CordError(entry.complaint(message)) from None
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(status or 0)


def main() -> NoReturn:
    """Run the console script."""
    entry.run(lambda: invoke(cord, sys.argv[1:], "cord"))


def shim(name: str) -> NoReturn:
    """Run one command as a script of tools/, with the same arguments."""
    script = Path(sys.argv[0]).name
    entry.run(lambda: invoke(load(name), sys.argv[1:], f"python tools/{script}"))
