"""Shim of ``cord report``: ``python tools/report.py`` takes the same arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project need not be installed

from megatron_cord.cli.main import shim


def main() -> NoReturn:
    """Run the command."""
    shim("report")


if __name__ == "__main__":
    main()
