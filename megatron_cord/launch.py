"""Start ranks: ``python -m megatron_cord.launch [torchrun options] -m megatron_cord.train …``.

All options are torchrun's. When a rank ends with a one-line error (status 2) or is interrupted, torchrun's report of
failures is left out and the status is passed on; after a crash the report is printed. A port in use is found before any
rank starts. SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks, which have all the time they need to save a
checkpoint; a second Ctrl-C ends them at once.
``--max-restarts`` starts the ranks again after a crash or a hang, but not when they were stopped by a signal or ended
with an error that the user must mend first.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher

from megatron_cord.config.source import read_tree
from megatron_cord.errors import CordError
from megatron_cord.runtime import device_queues, entry, exit_status
from megatron_cord.runtime.failures import port_in_use, release_claims

logger = logging.getLogger("megatron_cord.launch")  # also where this page is __main__

#: Statuses that a restart would lead to again.
FINAL = (exit_status.USER_ERROR, exit_status.BEYOND_GUARD, exit_status.STOPPED, exit_status.INTERRUPTED)
#: Signals that the ranks are given as a request to stop.
PASSED_ON = (*exit_status.STOP_SIGNALS, signal.SIGINT)
#: Statuses of ranks that have printed their error, or that were ended because another one did.
EXPECTED = (*FINAL, exit_status.PEER_GONE, exit_status.HUNG, -signal.SIGTERM)


class Agent(LocalElasticAgent):
    """torchrun's agent, passing signals to stop on to its ranks, and restarting them only where that can help."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._remaining_restarts = 0
        interrupted = number == signal.SIGINT
        # torch starts ranks in sessions of their own, so Ctrl-C reaches them from here alone; as SIGTERM, because each
        # of them would explain Ctrl-C to the user, and a second one ends a rank at once.
        if not self._signal_ranks(signal.SIGTERM if interrupted else number):  # before they start, or between attempts
            raise SignalException("a signal while no rank was running", signal.Signals(number))
        if interrupted:
            signal.signal(signal.SIGINT, self._end_at_once)
            logger.info("Ctrl-C: the ranks finish what they do and save; a second Ctrl-C ends them at once")

    def _end_at_once(self, number: int, frame: FrameType | None) -> None:
        self._signal_ranks(signal.SIGKILL)
        release_claims()
        os._exit(exit_status.INTERRUPTED)

    def _signal_ranks(self, number: int) -> int:
        """Send a signal to the ranks; return how many it reached."""
        reached = 0
        for process in ({} if self._pcontext is None else self._pcontext.pids()).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
                reached += 1
        return reached

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        statuses = {failure.exitcode for failure in result.failures.values()}
        if statuses & set(FINAL) and statuses <= set(EXPECTED):
            self._remaining_restarts = 0
        return result


def main() -> int:
    """Run the ranks of the command line."""
    return launch(sys.argv[1:])


def launch(options: Sequence[str]) -> int:
    """Run the ranks and return 0, or the status of a rank that crashed, else of the first that failed.

    Args:
        options: torchrun's, and the module or script with its arguments.

    Raises:
        CordError: the port is taken.
    """
    arguments = torchrun.parse_args(list(options))  # type: ignore[no-untyped-call]
    if not torch.cuda.is_available():
        if arguments.nproc_per_node == "gpu":
            raise CordError("--nproc-per-node gpu, but torch finds no GPU; give a number of ranks to train on CPUs")
        # More threads than cores collapse; torchrun would set it with a banner.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        device_queues.set_for_ranks(*_parallel_sizes(arguments.training_script_args))
    _check_port(arguments)
    if arguments.max_restarts and arguments.rdzv_backend == "static":
        _leave_static_rendezvous(arguments)
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).addFilter(_is_news)
    # torchrun would end ranks 30 seconds after a signal that it handles itself.
    names = {number.name for number in PASSED_ON}
    arguments.signals_to_handle = ",".join(name for name in arguments.signals_to_handle.split(",") if name not in names)
    launcher.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    try:
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
        crashes = [status for status in statuses if status not in EXPECTED]
        if crashes:
            print(error, file=sys.stderr)
        # The status of a rank that lost a peer says less than that peer's own.
        telling = (
            crashes or [status for status in statuses if status in FINAL] or [error.get_first_failure()[1].exitcode]
        )
        return telling[0] if telling[0] > 0 else 128 - telling[0]
    except SignalException as error:
        return 128 + error.sigval
    finally:
        release_claims()
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for the log lines about a rank that failed as EXPECTED, and about ending its peers."""
    message = record.getMessage()
    return not (
        message.startswith("Sending process") or any(f"failed (exitcode: {status})" in message for status in EXPECTED)
    )


def _leave_static_rendezvous(arguments: argparse.Namespace) -> None:
    """Choose another rendezvous than torchrun's static one.

    That one keeps its store over restarts: ranks that start again look for those before, and fail.
    """
    if torchrun.parse_min_max_nnodes(arguments.nnodes)[1] > 1:
        raise CordError(
            "--max-restarts on several nodes needs --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
            "in place of --master-addr"
        )
    arguments.rdzv_backend, arguments.rdzv_id = "c10d", f"launch-{os.getpid()}"
    arguments.rdzv_endpoint = f"127.0.0.1:{arguments.master_port or 0}"  # 0: any free one
    arguments.local_addr = arguments.local_addr or "127.0.0.1"


def _parallel_sizes(arguments: Sequence[str]) -> tuple[int, int]:
    """Return parallel.tp and parallel.cp of a program's arguments, ``--config FILE`` and ``a.b=value``.

    They are 1 where they are not given, or wrong, of which the ranks will complain.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, others = parser.parse_known_args(list(arguments))
        overrides = [word for word in others if "=" in word and not word.startswith("-")]
        parallel = read_tree(known.config, overrides).values.get("parallel")
    except (CordError, argparse.ArgumentError):
        return 1, 1
    sizes = parallel if isinstance(parallel, Mapping) else {}
    tp, cp = (size if isinstance(size := sizes.get(name, 1), int) else 1 for name in ("tp", "cp"))
    return tp, cp


def _check_port(arguments: argparse.Namespace) -> None:
    port = arguments.master_port
    if arguments.rdzv_endpoint:
        port = arguments.rdzv_endpoint.rpartition(":")[2]
    _, nodes = torchrun.parse_min_max_nnodes(arguments.nnodes)
    hosts_rendezvous = nodes == 1 or (arguments.rdzv_backend == "static" and int(arguments.node_rank) == 0)
    if not hosts_rendezvous or not str(port).isdigit() or int(port) == 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the store does: a port that lingers after a run is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
            probe.listen(1)
        except OverflowError:
            raise CordError(f"port {port} does not exist; give one below 65536 with --master-port") from None
        except OSError:
            raise CordError(port_in_use(int(port))) from None


if __name__ == "__main__":
    entry.run(main)
