"""The log of a run's metrics, above all after a stop in the middle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.trainer.metrics import MetricsLog

VALUES: dict[str, Any] = {"loss": 1.25, "kl": 0.5, "skipped": False}


def write(directory: Path, steps: range, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Logs steps as a run that has made `first` before; returns the file's lines."""
    with MetricsLog(directory, 10, first, enabled=True) as log:
        for step in steps:
            log.step(step, VALUES | more)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step(tmp_path: Path) -> None:
    """Catches lines that are lost, doubled or without their step."""
    assert write(tmp_path, range(1, 4)) == [{"step": step} | VALUES for step in (1, 2, 3)]


def test_a_resumed_run_drops_what_it_makes_again(tmp_path: Path) -> None:
    """Catches steps that appear twice after a run was killed beyond its last checkpoint."""
    write(tmp_path, range(1, 6), loss=9.0)
    lines = write(tmp_path, range(3, 5), first=2)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 9.0), (2, 9.0), (3, 1.25), (4, 1.25)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3', "{", "17", '{"loss": 1}'])
def test_a_half_written_line_goes(tmp_path: Path, rest: str) -> None:
    """Catches a run that cannot start because the one before was killed while it wrote, or that appends to half a line."""
    write(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert [line["step"] for line in write(tmp_path, range(3, 4), first=2)] == [1, 2, 3]


def test_a_whole_last_line_without_its_end_stays(tmp_path: Path) -> None:
    """Catches a step that is lost, or two on one line, because only the line's end was not written."""
    write(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert [line["step"] for line in write(tmp_path, range(3, 4), first=2)] == [1, 2, 3]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """Catches NaN and infinity in JSON, of skipped steps for example."""
    (line,) = write(tmp_path, range(1, 2), loss=math.nan, kl=math.inf, grad_norm=-math.inf, skipped=True)
    assert line == {"step": 1, "loss": None, "kl": None, "grad_norm": None, "skipped": True}


def test_ranks_that_do_not_speak(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a line from every rank."""
    with MetricsLog(tmp_path, 10, 0, enabled=False) as log:
        log.step(1, VALUES)
        log.evaluation(1, {"text_accuracy": 0.5})
        log.say("hello")
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
