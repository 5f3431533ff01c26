"""What every entry point shares: arguments, logging, one line for a user's error, and an exit that never hangs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_cord.errors import CordError
from megatron_cord.runtime.exit_status import INTERRUPTED, PEER_GONE, USER_ERROR
from megatron_cord.runtime.failures import explain, has_peers, lost_peer, report_once
from megatron_cord.runtime.log import LEVELS, configure_logging


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
    """Configure logging, call `main`, and end the process.

    The status is that of `main`, or 0; 2 after a user's error, in one line; 130 after Ctrl-C; 3 after a peer's end
    (see ``megatron_cord.runtime.exit_status``). Anything else is a bug and keeps its traceback. A full disk and a port
    in use count as user errors.
    """
    try:
        configure_logging("info")  # an error about the level itself is logged too
        configure_logging()
        status = main() or 0
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        message = explain(error)
        if message is None:
            if not has_peers():
                raise
            traceback.print_exc()
            _leave(1)
        report_once(" ".join(message.split()))
        _leave(PEER_GONE if lost_peer(error) else USER_ERROR)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if has_peers():
        # The others may wait in a collective that will never come. A normal exit tears the process groups down and can
        # wait for them for ever; leaving at once closes the connections, so that they notice.
        os._exit(status)
    sys.exit(status)
