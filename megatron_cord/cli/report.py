"""``cord report``: a run as a page."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megatron_cord.cli.options import DIRECTORY, FILE


@click.command
@click.argument("run_dir", metavar="RUN_DIR", type=DIRECTORY)
@click.option("--output", metavar="FILE", type=FILE, help="The page (default: report.html in RUN_DIR).")
@click.option("--serve", is_flag=True, help="Serve a live page on 127.0.0.1 until Ctrl-C instead.")
@click.option("--port", metavar="N", type=int, default=8877, show_default=True, help="Of --serve; 0 takes a free one.")
def command(run_dir: Path, output: Path | None, serve: bool, port: int) -> None:
    """Write one HTML page about a run, finished or not.

    The page needs nothing else. With --serve it is a live page, for this machine alone.
    """
    if not serve:
        from megatron_cord.report.page.page import render

        click.echo(render(run_dir, output))
        return
    from megatron_cord.report.live.server import HOST, make_server

    with make_server(run_dir, port) as server:
        click.echo(f"http://{HOST}:{server.server_address[1]}/")
        sys.stdout.flush()
        click.echo("Ctrl-C ends it", err=True)
        server.serve_forever()
