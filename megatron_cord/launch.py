"""``python -m megatron_cord.launch [torchrun options] -m megatron_cord.train …``: torchrun, quiet where the ranks have said enough.

All options are torchrun's. When a rank ends with a one-line error (status 2) or is interrupted, torchrun's report of failures is left
out and the status is passed on; after a crash the report is printed. A port in use is found before any rank starts.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_cord import cli
from megatron_cord.errors import CordError

#: how ranks end that have said what there is to say, or that were ended for the sake of one that has
EXPECTED = (cli.USER_ERROR, cli.INTERRUPTED, -signal.SIGTERM)


def main() -> int:
    """Runs the ranks and returns 0, or the status of a rank that crashed, else of the first that failed. Raises CordError when the port is taken."""
    arguments = torchrun.parse_args(sys.argv[1:])
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores collapse; torchrun would set it with a banner
    _check_port(arguments)
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).addFilter(_is_news)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        crashes = [failure.exitcode for failure in error.failures.values() if failure.exitcode not in EXPECTED]
        if crashes:
            print(error, file=sys.stderr)
        status = crashes[0] if crashes else error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    finally:
        cli.release_claims()
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """False for the log lines about a rank that failed as EXPECTED, and about ending its peers."""
    message = record.getMessage()
    return not (message.startswith("Sending process") or any(f"failed (exitcode: {status})" in message for status in EXPECTED))


def _check_port(arguments: argparse.Namespace) -> None:
    port = arguments.master_port
    if arguments.rdzv_endpoint:
        port = arguments.rdzv_endpoint.rpartition(":")[2]
    _, nodes = torchrun.parse_min_max_nnodes(arguments.nnodes)
    hosts_rendezvous = nodes == 1 or (arguments.rdzv_backend == "static" and int(arguments.node_rank) == 0)
    if not hosts_rendezvous or not str(port).isdigit() or int(port) == 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: a port that lingers after a run is free
        try:
            probe.bind(("", int(port)))
            probe.listen(1)
        except OverflowError:
            raise CordError(f"port {port} does not exist; give one below 65536 with --master-port") from None
        except OSError:
            raise CordError(cli.port_in_use(int(port))) from None


if __name__ == "__main__":
    cli.run(main)
