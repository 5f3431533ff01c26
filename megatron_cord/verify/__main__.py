"""``python -m megatron_cord.verify SUBJECT [a.b=value …]``: checks of an installation that print what they found.

Each subject is a function from overrides to an exit status; the table below is all there is to adding one.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_cord.errors import CordError
from megatron_cord.runtime import entry
from megatron_cord.verify.environment import INSTALL, survey

logger = logging.getLogger(__name__)

STYLES = {"in use": "green", "available": "cyan", "missing": "yellow", "broken": "red"}


def environment(overrides: Sequence[str]) -> int:
    """Print the parts of this machine; return 1 when a required one is missing or broken, else 0."""
    if overrides:
        raise CordError(f"verify environment takes no settings, got '{overrides[0]}'")
    parts = survey(Path.cwd())
    table = Table(
        "part", "version", "state", "used for, or missed without it", box=None, header_style="bold", pad_edge=False
    )
    for part in parts:
        table.add_row(part.name, part.version or "–", f"[{STYLES[part.state]}]{part.state}[/]", escape(part.note))
    Console().print(table)
    failing = [part.name for part in parts if part.fails]
    if failing:
        logger.error("%s: required, and missing or broken; install with: %s", ", ".join(failing), INSTALL)
    return 1 if failing else 0


def loss(overrides: Sequence[str]) -> int:
    """Compare the divergence and its gradients with float64; ranks are those that torchrun started."""
    # It needs torch, whose absence ``environment`` must be able to report.
    from megatron_cord.verify.loss import verify_loss

    return verify_loss(overrides)


def layout(overrides: Sequence[str]) -> int:
    """Compare one training step under a layout with one rank; ranks are those that torchrun started."""
    from megatron_cord.verify.layout import verify_layout

    return verify_layout(overrides)


def weight_sync(overrides: Sequence[str]) -> int:
    """Compare servers after each transport of weights with a fresh one; ranks are those that torchrun started."""
    from megatron_cord.verify.weight_sync import verify_weight_sync

    return verify_weight_sync(overrides)


SUBJECTS: dict[str, Callable[[Sequence[str]], int]] = {
    "environment": environment,
    "loss": loss,
    "layout": layout,
    "weight_sync": weight_sync,
}


def _subject(name: str) -> str:
    """Refuse a former name with the present one."""
    if name == "exchange":
        raise argparse.ArgumentTypeError("'exchange' is now named 'weight_sync'")
    return name


def main() -> int:
    """Run the subject that the command line names."""
    parser = entry.Parser(
        prog="python -m megatron_cord.verify", description="Check an installation.", allow_abbrev=False
    )
    parser.add_argument("subject", type=_subject, choices=SUBJECTS, help="what to check")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the check's configuration")
    arguments = parser.parse_args()
    return SUBJECTS[arguments.subject](arguments.overrides)


if __name__ == "__main__":
    entry.run(main)
