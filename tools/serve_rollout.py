"""Starts SGLang servers of one checkpoint for rollout.engine=sglang, and keeps them running.

    python tools/serve_rollout.py CHECKPOINT --servers-file FILE [--count N] [-- further arguments of SGLang]

It stays in the foreground. A server that dies or hangs is started again; the trainer then brings it the current
weights. SIGTERM and Ctrl-C end all servers and remove FILE; the servers also end when this process is killed. The API
key, which anything but loopback needs, is $MEGATRON_CORD_SERVER_KEY or what --api-key-file holds.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from pathlib import Path
from types import FrameType

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.addresses import make_key, read_key, write_servers_file
from megatron_cord.rollout.sglang.server.process import ServerConfig, check_version
from megatron_cord.rollout.sglang.server.supervisor import Supervisor, SupervisorConfig
from megatron_cord.runtime import entry


def _parser() -> entry.Parser:
    server, all_ = ServerConfig(Path()), SupervisorConfig()
    parser = entry.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="Hugging Face checkpoint, the one that is trained"
    )
    parser.add_argument(
        "--servers-file",
        metavar="FILE",
        type=Path,
        required=True,
        help="gets their addresses; for rollout.servers_file",
    )
    parser.add_argument("--count", metavar="N", type=int, default=all_.count, help="servers")
    parser.add_argument(
        "--host", default=server.host, help="address they listen on; 0.0.0.0 for trainers on other machines"
    )
    parser.add_argument(
        "--port", type=int, default=all_.port, help="of the first one, the others have the next; 0 takes free ones"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default=server.device, help="cpu is for tests")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=server.dtype,
        help="auto: the checkpoint's own",
    )
    parser.add_argument("--tp", type=int, default=server.tp, help="GPUs of each server")
    parser.add_argument("--gpus", metavar="I,J,…", default="", help="GPUs to use; default 0, 1, 2 …")
    parser.add_argument(
        "--colocated", action="store_true", help="lets the trainer have their GPU memory meanwhile (rollout.colocated)"
    )
    parser.add_argument("--memory-fraction", type=float, help="of each GPU, for weights and cache")
    parser.add_argument(
        "--max-running-requests",
        type=int,
        default=server.max_running_requests,
        help="responses generated together by each",
    )
    parser.add_argument("--max-total-tokens", type=int, help="room in the cache of keys and values of each")
    parser.add_argument(
        "--unseeded", action="store_true", help="cuda: faster, but responses do not repeat from their seeds"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", type=Path, help="of the API key; made, for you alone, if it is missing"
    )
    parser.add_argument("--log-dir", metavar="DIR", type=Path, default=all_.log_dir, help="for what servers print")
    parser.add_argument("--python", type=Path, default=server.python, help="interpreter that SGLang is installed for")
    parser.add_argument(
        "--start-timeout",
        metavar="SECONDS",
        type=float,
        default=server.start_timeout,
        help="until a server must answer",
    )
    parser.add_argument(
        "--hang-seconds",
        metavar="SECONDS",
        type=float,
        default=all_.hang_seconds,
        help="not healthy for so long: started again",
    )
    parser.add_argument("more", metavar="-- ARGUMENTS", nargs="*", help="SGLang's own; they win")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise CordError(f"--gpus {text!r} is no list of numbers like 4,5,6,7") from None


def main() -> None:
    """Entry point."""
    given = _parser().parse_args()
    if not (given.checkpoint / "config.json").is_file():
        raise CordError(f"{given.checkpoint} is no checkpoint: it has no config.json")
    version = check_version(given.python)
    key = read_key(None) if given.api_key_file is None else make_key(given.api_key_file)
    server = ServerConfig(
        checkpoint=given.checkpoint.resolve(),
        host=given.host,
        device=given.device,
        dtype=given.dtype,
        tp=given.tp,
        python=given.python,
        max_running_requests=given.max_running_requests,
        max_total_tokens=given.max_total_tokens,
        memory_fraction=given.memory_fraction,
        seeded=not given.unseeded,
        colocated=given.colocated,
        start_timeout=given.start_timeout,
        more=tuple(given.more),
    )
    config = SupervisorConfig(
        count=given.count,
        gpus=_numbers(given.gpus),
        port=given.port,
        hang_seconds=given.hang_seconds,
        log_dir=given.log_dir,
    )
    stop = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        stop.set()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_cord").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with Supervisor(config, server, key) as supervisor:
        write_servers_file(given.servers_file, server.checkpoint, str(version), supervisor.urls)
        try:
            supervisor.run(stop)
        finally:
            given.servers_file.unlink(missing_ok=True)


if __name__ == "__main__":
    entry.run(main)
