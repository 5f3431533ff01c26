"""Shell completion: the script that click makes, kept where the shell reads it."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from megatron_cord.errors import CordError

#: Shell → its start-up file and the line there that loads the completion.
LOADED_BY = {
    "bash": (".bashrc", 'eval "$(_CORD_COMPLETE=bash_source cord)"'),
    "zsh": (".zshrc", 'eval "$(_CORD_COMPLETE=zsh_source cord)"'),
    "fish": (".config/fish/completions/cord.fish", "_CORD_COMPLETE=fish_source cord | source"),
}


def install_completion(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Add completion to the start-up file of the shell in $SHELL, once, and end."""
    if not wanted or ctx.resilient_parsing:
        return
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in LOADED_BY or get_completion_class(shell) is None:
        raise CordError(f"completion is there for {', '.join(LOADED_BY)}, not for SHELL={shell or '(unset)'}")
    name, line = LOADED_BY[shell]
    path = Path.home() / name
    there = path.read_text(encoding="utf-8") if path.is_file() else ""
    if line not in there:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{'' if not there or there.endswith(chr(10)) else chr(10)}{line}\n")
    click.echo(f"{path}: completion of cord for {shell}; it works in the next shell")
    ctx.exit()
