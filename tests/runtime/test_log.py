"""Log lines of several ranks on one standard error, beside progress bars."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_cord.errors import CordError
from megatron_cord.runtime import log
from megatron_cord.runtime.log import configure_logging
from megatron_cord.runtime.progress import Bars

SPEAKER = """
import logging, sys
from megatron_cord.runtime.log import configure_logging
configure_logging()
for i in range(2000):
    logging.getLogger("megatron_cord.test").info("%s %d", sys.argv[1], i)
"""
logger = logging.getLogger("megatron_cord.test")


class Terminal(io.StringIO):
    """A terminal that shows nothing."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    yield
    configure_logging("info", rank=0)


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
def test_another_ranks_bar_is_cleared(kind: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that is written behind another rank's bar, and escapes on terminals that show them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", kind)
    logger.error("x")
    assert terminal.getvalue() == written


def test_lines_scroll_above_a_bar() -> None:
    """Catches a line that is drawn over by the bar of its own process, or wrapped, or read as markup."""
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=40, color_system=None)
    text = "[red]" + "long " * 20
    with Bars("bar", console=console, auto_refresh=False) as bars:
        bars.add_task("")
        logger.info(text)
        assert log.live_consoles == [console]
    assert f"{text}\n" in terminal.getvalue() and not log.live_consoles


@pytest.mark.parametrize(
    ("level", "rank", "lines"),
    [
        (None, 0, ["i", "warning: w", "error: e"]),
        (None, 1, ["warning: w", "error: e"]),
        ("debug", 0, ["d", "i", "warning: w", "error: e"]),
        ("error", 0, ["error: e"]),
    ],
)
def test_levels(level: str | None, rank: int, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches INFO from every rank, a warning that only rank 0 may report, and a level that is not obeyed."""
    configure_logging(level, rank)
    for number, text in ((logging.DEBUG, "d"), (logging.INFO, "i"), (logging.WARNING, "w"), (logging.ERROR, "e")):
        logger.log(number, text)
    assert capsys.readouterr().err.splitlines() == lines


def test_the_environment_sets_level_and_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a variable that is ignored or wins over the flag, a wrong level that passes, and doubled lines."""
    monkeypatch.setenv(log.LEVEL_VARIABLE, "Warning")
    monkeypatch.setenv("RANK", "3")
    configure_logging()
    configure_logging()
    logger.info("i")
    logger.warning("w")
    configure_logging("debug", rank=0)
    logger.debug("d")
    assert capsys.readouterr().err == "warning: w\nd\n"
    monkeypatch.setenv(log.LEVEL_VARIABLE, "loud")
    with pytest.raises(CordError, match="MEGATRON_CORD_LOG_LEVEL=loud: expected one of debug, info, warning, error"):
        configure_logging()


def test_other_loggers_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a handler on the root logger, which would print what other packages log."""
    configure_logging("debug", rank=0)
    logging.getLogger("another.package").warning("w")
    assert "w" not in capsys.readouterr().err
