"""Print the reference of a run's configuration as Markdown: ``python tools/config_reference.py [SECTION]``.

The documentation's page on configuration gets it when the site is built. `cord config` shows the same in the terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project need not be installed

from megatron_cord.config import reference
from megatron_cord.errors import CordError
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig


def markdown(only: str = "") -> str:
    """Return the reference, or that of one section.

    Raises:
        CordError: there is no such section.
    """
    known = list(reference.sections(RunConfig))
    names = [section.name for section in known if section.name]
    if only and only not in names:
        raise CordError(f"there is no section {only}; choose one of {', '.join(names)}")
    return reference.markdown([section for section in known if only in ("", section.name)])


def main() -> None:
    """Entry point."""
    parser = entry.Parser(description="Print the reference of a run's configuration as Markdown.", allow_abbrev=False)
    parser.add_argument(
        "section", metavar="SECTION", nargs="?", default="", help="one section alone, such as rollout or metrics.wandb"
    )
    print(markdown(parser.parse_args().section))


if __name__ == "__main__":
    entry.run(main)
