"""``cord report``: a run as a page, or several beside each other."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megatron_cord.cli.options import DIRECTORY, FILE


@click.command
@click.argument("run_dirs", metavar="RUN_DIR...", type=DIRECTORY, nargs=-1, required=True)
@click.option(
    "--output",
    metavar="FILE",
    type=FILE,
    help="The page (default: report.html in RUN_DIR; of several runs, comparison.html beside the first).",
)
@click.option("--serve", is_flag=True, help="Serve a live page on 127.0.0.1 until Ctrl-C instead.")
@click.option("--port", metavar="N", type=int, default=8877, show_default=True, help="Of --serve; 0 takes a free one.")
def command(run_dirs: tuple[Path, ...], output: Path | None, serve: bool, port: int) -> None:
    """Write one HTML page about a run, finished or not, or about several.

    The page needs nothing else. Of several runs it has their curves laid over each other, the settings that differ, and
    their evaluations; the first is the one that the others are compared with. With --serve it is a live page, for this
    machine alone.
    """
    if not serve:
        from megatron_cord.report.comparison.page import render_comparison
        from megatron_cord.report.page.page import render

        click.echo(render(run_dirs[0], output) if len(run_dirs) == 1 else render_comparison(run_dirs, output))
        return
    from megatron_cord.report.live.server import HOST, make_server

    with make_server(run_dirs, port) as server:
        click.echo(f"http://{HOST}:{server.server_address[1]}/")
        sys.stdout.flush()
        click.echo("Ctrl-C ends it", err=True)
        server.serve_forever()
