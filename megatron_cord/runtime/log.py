"""Log lines of a rank on standard error, which several ranks of a run and their progress bars share.

Modules log with ``logging.getLogger(__name__)``; entry points call ``configure_logging`` once. INFO is the bare
message, from rank 0 alone; warnings and errors have their level in front and come from every rank. The level is that of
``--log-level``, else of the environment variable MEGATRON_CORD_LOG_LEVEL, else INFO. Loggers of other packages are left
as they are.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = "megatron_cord"
LEVEL_VARIABLE = "MEGATRON_CORD_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error")

#: Consoles on which this process draws a progress bar now (see ``megatron_cord.runtime.progress``).
live_consoles: list[Console] = []

_CLEAR = "\r\x1b[K"  #: removes what another rank's progress bar has drawn on the terminal's line


class LineHandler(logging.Handler):
    """Write each record as one line, in one write, without disturbing progress bars.

    One write: with PYTHONUNBUFFERED, which many images set, ``print`` writes the line break by itself, and the lines of
    two ranks run into one.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.setFormatter(_Formatter())

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop what only rank 0 reports."""
        return (self.rank == 0 or record.levelno >= logging.WARNING) and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record above the bar of this process, or in the place of another process's."""
        try:
            line = self.format(record)
            for console in live_consoles[-1:]:
                console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
                return
            drawn = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
            sys.stderr.write(f"{_CLEAR if drawn else ''}{line}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    """The message alone below WARNING, else the level in lower case before it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class has it
        message = super().formatMessage(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


@cache
def info_once(message: str) -> None:
    """Log a line, however often this process comes to it, the first time alone."""
    logging.getLogger(LOGGER).info(message)


def configure_logging(level: str | None = None, rank: int | None = None) -> None:
    """Set the level of the project's logger and give it its one handler; a second call changes level and rank.

    Args:
        level: one of `LEVELS`; None reads MEGATRON_CORD_LOG_LEVEL.
        rank: of this process; None reads RANK, which launchers set.

    Raises:
        CordError: there is no such level.
    """
    source = "--log-level" if level else LEVEL_VARIABLE
    name = (level or os.environ.get(LEVEL_VARIABLE) or "info").lower()
    if name not in LEVELS:
        raise CordError(f"{source}={name}: expected one of {', '.join(LEVELS)}")
    logger = logging.getLogger(LOGGER)
    logger.setLevel(name.upper())
    for handler in [handler for handler in logger.handlers if isinstance(handler, LineHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(LineHandler(int(os.environ.get("RANK") or 0) if rank is None else rank))
