"""What every entry point shares: arguments, one line for a user's error, and an exit that never hangs.

Several ranks often fail together, with the same error or with "connection closed by peer" after another rank has left. On each
node the first one to create a small file in the temporary directory speaks; the others leave in silence with the same status, once it has
spoken: a launcher that sees one rank leave ends the others at once.
It simplifies: a node's ranks are recognised by their common parent (torchrun's agent, or the SLURM step).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_cord.errors import CordError
from megatron_cord.runtime.log import say

USER_ERROR = 2  #: exit status after a one-line error; a bug exits with 1 and keeps its traceback
INTERRUPTED = 130  #: exit status after Ctrl-C, as shells have it
PEER_GONE = 3  #: exit status of a rank that lost another one; starting again can help, if that one's own status does not forbid it
STOPPED = 75  #: exit status of a run that was asked to stop and saved a checkpoint; the same command continues it
HUNG = 124  #: exit status of a rank that made no progress for too long (see ``megatron_cord.trainer.observability.watchdog``)
#: what asks a run to stop: SIGTERM, and SIGUSR1 as SLURM's notice before the time limit
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_VOICE_SECONDS = 10.0  #: for which a rank waits until another one has printed their error
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)( by)?( peer)?|broken pipe|socket closed|remote process exited"
    r"|timed out after \d+ seconds waiting for clients|wait timeout after \d+ms",  # it never came
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Arguments:
    """What an entry point was given."""

    config: Path | None  #: the YAML file
    overrides: tuple[str, ...]  #: ``a.b=value``, applied in order


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one-line errors like all others; use it inside ``run``."""

    def error(self, message: str) -> NoReturn:
        advice = "; overrides are written a.b=value, without dashes" if "unrecognized arguments: -" in message else ""
        raise CordError(f"{message}{advice} (see --help)")


def parse_args(description: str, *, config_required: bool = True, arguments: Sequence[str] | None = None) -> Arguments:
    """``--config FILE [a.b=value …]`` from the command line (or from ``arguments``). Raises CordError for anything else."""
    spec = sys.modules["__main__"].__spec__
    parser = Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=config_required, help="YAML configuration")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the configuration")
    parsed = parser.parse_intermixed_args(arguments)
    return Arguments(config=parsed.config, overrides=tuple(parsed.overrides))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls ``main`` and ends the process: its return value or 0; 2 after a user's error, in one line; 130 after Ctrl-C; 3 after a peer's end.

    Anything else is a bug and keeps its traceback. A full disk and a port in use count as user errors.
    """
    try:
        status = main() or 0
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        message = explain(error)
        if message is None:
            if not _has_peers():
                raise
            traceback.print_exc()
            _leave(1)
        _say_once(f"error: {' '.join(message.split())}")
        _leave(PEER_GONE if _lost_peer(error) else USER_ERROR)
    sys.exit(status)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for a bug. Looks through the chain of causes for a full disk."""
    if isinstance(error, CordError):
        return str(error)
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{cause.filename or 'a file being written'}: the disk is full; free some space or write to another disk"
    text = str(error)
    if isinstance(error, RuntimeError) and "EADDRINUSE" in text:
        port = re.search(r"port: (\d+)", text)
        return port_in_use(int(port[1]) if port else None)
    if lost := _lost_peer(error):
        return f"another rank is gone ({lost}); its own message, here or on its node, says why"
    return None


def _lost_peer(error: BaseException) -> str | None:
    """How a collective noticed that another rank has left; None if the error is another."""
    lost = _PEER_GONE.search(str(error)) if isinstance(error, RuntimeError) and _has_peers() else None
    return lost[0].lower() if lost else None


def port_in_use(port: int | None) -> str:
    """The message for a rendezvous port that another process holds."""
    name = "the rendezvous port" if port is None else f"port {port}"
    return (
        f"{name} is in use on this machine; give another with --master-port (MASTER_PORT), or end the run that holds it"
    )


def _say_once(line: str) -> None:
    """Prints the line, if this is the only process of its node that may, or the first that wants to; else waits until that one has."""
    if not _has_peers():
        say(line)
        return
    about = [
        os.environ.get(name, "")
        for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    ]
    run_name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]
    claim = Path(f"{_claim_prefix(os.getppid())}{run_name}")
    with contextlib.suppress(OSError):  # a full or read-only temporary directory: better said twice than not at all
        try:
            claim.touch(0o600, exist_ok=False)
        except FileExistsError:
            deadline = time.monotonic() + _VOICE_SECONDS
            while claim.exists() and not claim.stat().st_mode & 0o100 and time.monotonic() < deadline:
                time.sleep(0.01)
            return
    say(line)
    with contextlib.suppress(OSError):
        claim.chmod(0o700)  # said; a full disk takes no byte, but this


def release_claims() -> None:
    """Removes the claims of this process's children; for launchers, when all of them are gone."""
    prefix = _claim_prefix(os.getpid())
    for claim in prefix.parent.glob(f"{prefix.name}*"):
        claim.unlink(missing_ok=True)


def _claim_prefix(parent: int) -> Path:
    try:
        born = int(
            psutil.Process(parent).create_time() * 1000
        )  # process ids are used again, pairs with a birth time are not
    except psutil.Error:
        born = 0
    return Path(tempfile.gettempdir()) / f"megatron_cord-error-{os.getuid()}-{parent}-{born}-"


def _has_peers() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if _has_peers():
        # The others may wait in a collective that will never come. A normal exit tears the process groups down and can wait for
        # them for ever; leaving at once closes the connections, so that they notice.
        os._exit(status)
    sys.exit(status)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
