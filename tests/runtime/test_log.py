"""Lines of several ranks on one standard error."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cord.runtime import log

SPEAKER = "import sys; from megatron_cord.runtime.log import say; [say(f'{sys.argv[1]} {i}') for i in range(2000)]"


class Terminal(io.StringIO):
    """A terminal that shows nothing."""

    def isatty(self) -> bool:
        return True


def test_lines_of_two_ranks_stay_whole() -> None:
    """Catches a line break that is written by itself, so that an error follows another rank's line on the same one."""
    environment = os.environ | {"PYTHONPATH": str(Path(log.__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    read, write = os.pipe()
    ranks = [
        subprocess.Popen([sys.executable, "-c", SPEAKER, name], stderr=write, env=environment)
        for name in ("first", "second")
    ]
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert sorted(lines) == sorted(f"{name} {i}" for name in ("first", "second") for i in range(2000))


@pytest.mark.parametrize(("kind", "written"), [("xterm", "\r\x1b[Kerror: x\n"), ("dumb", "error: x\n")])
def test_a_progress_bar_makes_way(kind: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that is written behind another rank's bar, and escapes on terminals that show them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", kind)
    log.say("error: x")
    assert terminal.getvalue() == written
