"""Lines on standard error, which several ranks of a run share."""

from __future__ import annotations

import os
import sys

_CLEAR = "\r\x1b[K"  #: takes away what another rank's progress bar has drawn on the terminal's line


def say(line: str) -> None:
    """Writes one line (without its line break) at once.

    In one write: with PYTHONUNBUFFERED, which many images set, ``print`` writes the line break by itself, and the lines of two ranks run
    into one.
    """
    drawn = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    sys.stderr.write(f"{_CLEAR if drawn else ''}{line}\n")
    sys.stderr.flush()
