"""What every entry point shares: arguments, logging, one line for a user's error, and an exit that never hangs."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_cord.errors import CordError
from megatron_cord.runtime.exit_status import BUG, INTERRUPTED, PEER_GONE, STOPPED, USER_ERROR
from megatron_cord.runtime.failures import explain, has_peers, lost_peer, report_once
from megatron_cord.runtime.log import LEVELS, configure_logging
from megatron_cord.runtime.parent import end_with_parent
from megatron_cord.runtime.stop_request import StoppedError

logger = logging.getLogger(__name__)

#: Statuses of processes that may leave peers in a collective.
_ABANDONED = (BUG, INTERRUPTED, PEER_GONE, USER_ERROR)


@dataclass(frozen=True)
class Arguments:
    """Where an entry point's configuration comes from."""

    config: Path | None  #: the YAML file
    overrides: tuple[str, ...]  #: ``a.b=value``, applied in order


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one-line errors like all others; use it inside ``run``."""

    def error(self, message: str) -> NoReturn:
        """Raise CordError in place of printing the usage."""
        raise CordError(complaint(message))


def complaint(message: str) -> str:
    """Return the one line for a command line that is wrong."""
    dashed = "unrecognized arguments: -" in message or "No such option" in message
    advice = "; overrides are written a.b=value, without dashes" if dashed else ""
    return f"{message}{advice} (see --help)"


def parse_args(description: str, *, config_required: bool = True, arguments: Sequence[str] | None = None) -> Arguments:
    """Read ``--config FILE [a.b=c …] [--log-level LEVEL]``; the level is set at once.

    Args:
        description: for the help page.
        config_required: whether ``--config`` must be given.
        arguments: in the place of the command line's.

    Raises:
        CordError: anything else.
    """
    spec = sys.modules["__main__"].__spec__
    parser = Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=config_required, help="YAML configuration")
    parser.add_argument("--log-level", choices=LEVELS, help="of log lines (default: info, or MEGATRON_CORD_LOG_LEVEL)")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the configuration")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.log_level:
        configure_logging(parsed.log_level)
    return Arguments(config=parsed.config, overrides=tuple(parsed.overrides))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Configure logging, call `main`, and end the process with the status of `status_of`.

    A rank that torchrun or ``megatron_cord.launch`` started ends with that process: it is in a session of its own,
    which a signal to the launcher's group does not reach, and would keep its GPU and its memory.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    end(status_of(main))


def end(status: int) -> NoReturn:
    """End the process with what the interpreter does before it ends, and without taking anything down.

    After a failure, others may wait in a collective that will never come, and taking the process groups down can wait
    for them for ever; leaving at once closes the connections, so that they notice. After a success, a thread of gloo's
    that still runs when its group is taken down makes the C++ runtime abort ("terminate called without an active
    exception"), which would turn a finished run into a failed job.
    """
    if status not in _ABANDONED or not has_peers():
        threading._shutdown()  # type: ignore[attr-defined]  # these two, as in the processes that multiprocessing forks
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def status_of(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit status, with failures reported.

    It is that of `main`, or 0; 2 after a user's error, in one line; 75 after a request to stop; 130 after Ctrl-C where
    none was possible; 3 after a peer's end
    (see ``megatron_cord.runtime.exit_status``); 1 after a bug beside peers, with its traceback. A bug of a process
    without peers is raised. A full disk and a port in use count as user errors.
    """
    try:
        configure_logging("info")  # an error about the level itself is logged too
        configure_logging()
        return main() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except StoppedError as stopped:
        logger.info("%s", stopped)
        return STOPPED
    except Exception as error:
        message = explain(error)
        if message is None:
            if not has_peers():
                raise
            traceback.print_exc()
            return BUG
        report_once(" ".join(message.split()))
        return PEER_GONE if lost_peer(error) else USER_ERROR
