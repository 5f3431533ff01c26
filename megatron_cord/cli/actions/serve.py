"""Start SGLang servers of one checkpoint, and keep them running."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.rollout.sglang.client.addresses import make_key, read_key, write_servers_file
from megatron_cord.rollout.sglang.models import served_model
from megatron_cord.rollout.sglang.server.process import ServerConfig, check_version
from megatron_cord.rollout.sglang.server.supervisor import Supervisor, SupervisorConfig


def serve(
    checkpoint: Path,
    more: tuple[str, ...],
    *,
    servers_file: Path,
    count: int,
    gpus: str,
    port: int,
    hang_seconds: float,
    log_dir: Path,
    api_key_file: Path | None,
    unseeded: bool,
    **server_options: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C; `server_options` are fields of `ServerConfig`."""
    directory = checkpoint_directory(checkpoint).resolve()
    served_model(directory)
    version = check_version(server_options["python"])
    key = read_key(None) if api_key_file is None else make_key(api_key_file)
    server = ServerConfig(checkpoint=directory, seeded=not unseeded, more=more, **server_options)
    config = SupervisorConfig(count, _numbers(gpus), port, hang_seconds, log_dir=log_dir)
    stop = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with Supervisor(config, server, key) as supervisor:
        write_servers_file(servers_file, server.checkpoint, str(version), supervisor.urls)
        try:
            supervisor.run(stop)
        finally:
            servers_file.unlink(missing_ok=True)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise CordError(f"--gpus {text!r} is no list of numbers like 4,5,6,7") from None
