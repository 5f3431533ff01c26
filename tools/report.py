"""Draws a run as one HTML page, or serves it while it goes on: ``python tools/report.py [--serve] RUN_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_cord.report.live.server import HOST, make_server
from megatron_cord.report.page.page import render
from megatron_cord.runtime import entry


def main() -> None:
    """Entry point."""
    parser = entry.Parser(
        description="Draws a run, finished or not, as one HTML page that needs nothing else; or serves a live page of it to this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's output directory")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the page (default: report.html in the run's directory)"
    )
    parser.add_argument("--serve", action="store_true", help="serve a live page on 127.0.0.1 until Ctrl-C instead")
    parser.add_argument(
        "--port", metavar="N", type=int, default=8877, help="of --serve (default: 8877; 0 takes a free one)"
    )
    arguments = parser.parse_args()
    if not arguments.serve:
        print(render(arguments.run_dir, arguments.output))
        return
    with make_server(arguments.run_dir, arguments.port) as server:
        print(f"http://{HOST}:{server.server_address[1]}/", flush=True)
        print("Ctrl-C ends it", file=sys.stderr)
        server.serve_forever()


if __name__ == "__main__":
    entry.run(main)
