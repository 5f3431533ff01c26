"""Errors that the user can mend, in one line, and their report by one rank of a node.

Several ranks often fail together, with the same error or with "connection closed by peer" after another rank has left.
On each node the first one to create a small file in the temporary directory reports it; the others leave without a line
and with the same status, once the report is written: a launcher ends all ranks as soon as one has left.
It simplifies: a node's ranks are recognised by their common parent (torchrun's agent, or the SLURM step).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import fingerprint

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 10.0  #: for which a rank waits until another one has printed their error
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)( by)?( peer)?|broken pipe|socket closed|remote process exited"
    r"|timed out after \d+ seconds waiting for clients|wait timeout after \d+ms",  # it never came
    re.IGNORECASE,
)


def explain(error: BaseException) -> str | None:
    """Return one line for an error that the user can mend, None for a bug; look behind it for a full disk."""
    if isinstance(error, CordError):
        return str(error)
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            file = cause.filename or "a file being written"
            return f"{file}: the disk is full; free some space or write to another disk"
    text = str(error)
    if isinstance(error, RuntimeError) and "EADDRINUSE" in text:
        port = re.search(r"port: (\d+)", text)
        return port_in_use(int(port[1]) if port else None)
    if lost := lost_peer(error):
        return f"another rank is gone ({lost}); its own message, here or on its node, has the reason"
    return None


def lost_peer(error: BaseException) -> str | None:
    """Return how a collective noticed that another rank has left; None if the error is another."""
    lost = _PEER_GONE.search(str(error)) if isinstance(error, RuntimeError) and has_peers() else None
    return lost[0].lower() if lost else None


def port_in_use(port: int | None) -> str:
    """Return the message for a rendezvous port that another process holds."""
    name = "the rendezvous port" if port is None else f"port {port}"
    return (
        f"{name} is in use on this machine; give another with --master-port (MASTER_PORT), or end the run that holds it"
    )


def has_peers() -> bool:
    """Return whether a launcher started several ranks, this process among them."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def report_once(message: str) -> None:
    """Log the error, if this process is alone on its node or the first to report; else wait until that one has."""
    if not has_peers():
        logger.error(message)
        return
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    claim = Path(f"{_claim_prefix(os.getppid())}{fingerprint(os.environ.get(name, '') for name in names)}")
    with contextlib.suppress(OSError):  # a full or read-only temporary directory: twice is better than not at all
        try:
            claim.touch(0o600, exist_ok=False)
        except FileExistsError:
            deadline = time.monotonic() + _REPORT_SECONDS
            while claim.exists() and not claim.stat().st_mode & 0o100 and time.monotonic() < deadline:
                time.sleep(0.01)
            return
    logger.error(message)
    with contextlib.suppress(OSError):
        claim.chmod(0o700)  # reported; a full disk takes no byte, but this


def release_claims() -> None:
    """Remove the claims of this process's children; for launchers, when all of them are gone."""
    prefix = _claim_prefix(os.getpid())
    for claim in prefix.parent.glob(f"{prefix.name}*"):
        claim.unlink(missing_ok=True)


def _claim_prefix(parent: int) -> Path:
    import psutil  # only where ranks fail together

    try:
        # Process ids are used again, pairs with a birth time are not.
        born = int(psutil.Process(parent).create_time() * 1000)
    except psutil.Error:
        born = 0
    return Path(tempfile.gettempdir()) / f"megatron_cord-error-{os.getuid()}-{parent}-{born}-"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
