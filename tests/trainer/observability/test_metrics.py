"""The log of a run's metrics, above all after a stop in the middle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cord.trainer.observability.alerts import AlertConfig
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.trackers.config import MetricsConfig

VALUES: dict[str, Any] = {"loss": 1.25, "kl": 0.5, "skipped": False}


def write(directory: Path, steps: range, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Log steps as a run that has made `first` before; return the file's lines."""
    with MetricsLog(directory, 10, first, enabled=True) as log:
        for step in steps:
            log.step(step, VALUES | more)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step(tmp_path: Path) -> None:
    """Catches lines that are lost, doubled or without their step."""
    assert write(tmp_path, range(1, 4)) == [{"step": step} | VALUES | {"alerts": 0} for step in (1, 2, 3)]


def test_a_resumed_run_drops_what_it_makes_again(tmp_path: Path) -> None:
    """Catches steps that appear twice after a run was killed beyond its last checkpoint."""
    write(tmp_path, range(1, 6), loss=9.0)
    lines = write(tmp_path, range(3, 5), first=2)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 9.0), (2, 9.0), (3, 1.25), (4, 1.25)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3', "{", "17", '{"loss": 1}'])
def test_a_half_written_line_goes(tmp_path: Path, rest: str) -> None:
    """Catches a run that cannot start because the one before was killed while it wrote.

    Also that appends to half a line.
    """
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
    assert line == {"step": 1, "loss": None, "kl": None, "grad_norm": None, "skipped": True, "alerts": 0}


def test_ranks_that_do_not_speak(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a line from every rank."""
    with MetricsLog(tmp_path, 10, 0, enabled=False) as log:
        log.step(1, VALUES)
        log.evaluation({"step": 1})
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_tensorboard_has_every_scalar(tmp_path: Path) -> None:
    """Catches a default that writes no curves, values under wrong steps.

    Also steps of a run before that stay in a resumed run's curves.
    """
    accuracies = {"step": 0, "samples": 8, "text_accuracy": 1.0, "audio_accuracy": 0.25}
    with MetricsLog(tmp_path, 10, 0, enabled=True) as log:
        log.evaluation(accuracies)
    write(tmp_path, range(1, 6), entropy=2.0, loss=9.0)
    write(tmp_path, range(3, 5), first=2, entropy=1.0, kl=math.nan)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("loss/entropy")] == [
        (1, 2.0),
        (2, 2.0),
        (3, 1.0),
        (4, 1.0),
    ]
    assert [event.value for event in curves.Scalars("evaluation/audio_accuracy")] == [0.25]
    assert [event.step for event in curves.Scalars("loss/kl")] == [1, 2]
    assert not [tag for tag in curves.Tags()["scalars"] if "skipped" in tag]


def test_no_tensorboard(tmp_path: Path) -> None:
    """Catches a setting that does nothing."""
    with MetricsLog(tmp_path, 10, 0, MetricsConfig(tensorboard=False), enabled=True) as log:
        log.step(1, VALUES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def log_length(directory: Path, steps: range, growth: float, first: int = 0) -> tuple[list[dict[str, Any]], list[int]]:
    """Log responses that grow by so many tokens a step; return the alerts' lines and how many held at each step."""
    directory.mkdir(exist_ok=True)
    with MetricsLog(directory, 100, first, alerts=AlertConfig(window=3), enabled=True) as log:
        for step in steps:
            log.step(step, VALUES | {"response_tokens": 10 + growth * step})
    path = directory / "alerts.jsonl"
    alerts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return alerts, [json.loads(line)["alerts"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_alerts_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an alert that is missing or repeated at every step it holds, and metrics that do not count it."""
    alerts, held = log_length(tmp_path, range(1, 21), growth=2.0)
    assert [(alert["step"], alert["kind"]) for alert in alerts] == [(11, "length explosion")]
    assert held == [0] * 10 + [1] * 10
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"alert at step 11: length explosion: {alerts[0]['words']}"] and "at first 14" in alerts[0]["words"]


def test_a_resumed_run_alerts_like_one_that_was_not_stopped(tmp_path: Path) -> None:
    """Catches a resumed run that compares with its own first steps only, says again what was said.

    Also keeps alerts of steps it makes again.
    """
    whole = log_length(tmp_path / "whole", range(1, 21), growth=2.0)
    for name, last in (("early", 5), ("late", 15)):
        log_length(tmp_path / name, range(1, 18), growth=2.0)
        assert log_length(tmp_path / name, range(last + 1, 21), growth=2.0, first=last) == whole


def test_an_alert_that_comes_and_goes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the same warning again and again where a metric lies at its threshold, also after a resumption."""
    for first in (0, 20):
        with MetricsLog(tmp_path, 100, first, alerts=AlertConfig(window=2), enabled=True) as log:
            for step in range(first + 1, first + 21):
                log.step(step, VALUES | {"response_tokens": 10 if step % 10 < 4 else 50})
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 1
    held = [json.loads(line)["alerts"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 in held[10:] and 1 in held[10:]


def test_evaluations_alert_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a fall of the accuracy without an alert, also where the run was resumed after it."""
    results = [
        {"step": step, "samples": 1000, "text_accuracy": 0.9, "audio_accuracy": share}
        for step, share in ((0, 0.3), (5, 0.8), (10, 0.4))
    ]
    with MetricsLog(tmp_path, 10, 5, evaluations=results[:2], enabled=True) as log:
        log.evaluation(results[1])  # made up for after a resumption: the same again
        assert not (tmp_path / "alerts.jsonl").exists()
        log.evaluation(results[2])
    assert "alert at step 10: collapse: audio accuracy fell from 80% (step 5) to 40%" in caplog.text
