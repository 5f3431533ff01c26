"""Draws a run as one HTML page: ``python tools/report.py RUN_DIR [--output FILE]``. The run may still be going on."""

from __future__ import annotations

from pathlib import Path

from megatron_cord import cli
from megatron_cord.report.page import render


def main() -> None:
    """Entry point."""
    parser = cli.Parser(description="Draws a run, finished or not, as one HTML page that needs nothing else.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's output directory")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the page (default: report.html in the run's directory)")
    arguments = parser.parse_args()
    print(render(arguments.run_dir, arguments.output))


if __name__ == "__main__":
    cli.run(main)
