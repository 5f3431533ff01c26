"""``cord serve``: rollout servers for rollout.engine=sglang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megatron_cord.cli.options import DIRECTORY, FILE


@click.command
@click.argument("checkpoint", metavar="CHECKPOINT", type=DIRECTORY)
@click.option(
    "--servers-file",
    metavar="FILE",
    type=FILE,
    required=True,
    help="Gets their addresses; for rollout.sglang.servers_file.",
)
@click.option("--count", metavar="N", type=int, default=1, show_default=True, help="Servers.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address they listen on; 0.0.0.0 for trainers on other machines.",
)
@click.option(
    "--port", type=int, default=0, show_default=True, help="Of the first one, the others have the next; 0: free ones."
)
@click.option(
    "--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True, help="cpu is for tests."
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own.",
)
@click.option("--tp", type=int, default=1, show_default=True, help="GPUs of each server.")
@click.option("--gpus", metavar="I,J,…", default="", help="GPUs to use (default: 0, 1, 2 …).")
@click.option(
    "--colocated",
    is_flag=True,
    help="Lend their GPU memory to the trainer between rollouts (rollout.schedule.colocated).",
)
@click.option("--memory-fraction", type=float, help="Of each GPU, for weights and cache.")
@click.option(
    "--max-running-requests", type=int, default=32, show_default=True, help="Responses generated together by each."
)
@click.option("--max-total-tokens", type=int, help="Room in the cache of keys and values of each.")
@click.option("--unseeded", is_flag=True, help="cuda: faster, but responses do not repeat from their seeds.")
@click.option(
    "--api-key-file", metavar="FILE", type=FILE, help="Of the API key; made, readable by you alone, if it is missing."
)
@click.option(
    "--log-dir",
    metavar="DIR",
    type=DIRECTORY,
    default=Path("runs/servers"),
    show_default=True,
    help="For what servers print.",
)
@click.option(
    "--python",
    type=FILE,
    default=Path(".venv-sglang/bin/python"),
    show_default=True,
    help="Interpreter that SGLang is installed for.",
)
@click.option(
    "--start-timeout",
    metavar="SECONDS",
    type=float,
    default=600.0,
    show_default=True,
    help="Until a server must answer.",
)
@click.option(
    "--hang-seconds",
    metavar="SECONDS",
    type=float,
    default=180.0,
    show_default=True,
    help="A server that is not healthy for so long is started again.",
)
@click.argument("more", metavar="[-- ARGUMENTS]...", nargs=-1)
def command(checkpoint: Path, more: tuple[str, ...], **options: Any) -> None:
    """Start SGLang servers of a checkpoint for rollout.engine=sglang, and keep them running.

    The command stays in the foreground. A server that dies or hangs is started again; the trainer then sends it the
    current weights. SIGTERM and Ctrl-C end all servers and remove the servers file; the servers also end when this
    process is killed. The API key, which anything but loopback needs, is $MEGATRON_CORD_SERVER_KEY or the content of
    --api-key-file. ARGUMENTS are SGLang's own; they win.
    """
    from megatron_cord.cli.actions.serve import serve

    serve(checkpoint, more, **options)
