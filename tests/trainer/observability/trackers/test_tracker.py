"""A tracker that fails: the run goes on, hears of it once, and nothing is lost that can be recorded later."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_cord.trainer.observability.trackers.mlflow import allowed_name
from megatron_cord.trainer.observability.trackers.tracker import PatientTracker, kept_id


class Server:
    """A tracker whose connection can be cut."""

    def __init__(self) -> None:
        self.gone, self.asked = False, 0
        self.records: list[tuple[int, dict[str, float]]] = []
        self.refused: set[int] = set()
        self.closed: bool | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.asked += 1
        if self.gone:
            raise ConnectionError("no route\nto the server")
        if step in self.refused:
            raise ValueError("invalid name")
        self.records.append((step, dict(scalars)))

    def close(self, *, failed: bool) -> None:
        if self.gone:
            raise ConnectionError("no route\nto the server")
        self.closed = failed


@pytest.fixture
def words(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="megatron_cord")
    return caplog


def test_a_failure_is_named_once_and_made_up_for(words: pytest.LogCaptureFixture) -> None:
    """Catches an error that ends the run, a warning at each step, records that are lost, doubled or out of order."""
    now = 0.0
    server = Server()
    tracker = PatientTracker("MLflow", server, lambda: now)
    for step in range(1, 11):
        now, server.gone = 40.0 * step, 3 <= step <= 6
        tracker.log(step, {"loss/loss": float(step)})
    tracker.close(failed=True)
    assert [step for step, _ in server.records] == list(range(1, 11)) and server.closed is True
    assert words.messages == [
        "MLflow fails (ConnectionError: no route to the server); the run goes on and tries again; metrics.jsonl has "
        "every step"
    ]


def test_a_server_that_is_gone_is_asked_seldom(words: pytest.LogCaptureFixture) -> None:
    """Catches a dead server whose timeout each step waits for, an error at the end, and records lost in silence."""
    now = 0.0
    server = Server()
    server.gone = True
    tracker = PatientTracker("MLflow", server, lambda: now)
    for step in range(1, 1001):
        now = float(step)  # a second a step
        tracker.log(step, {"loss/loss": 1.0})
    assert server.asked <= 12  # twice a try: the first record, and whether the one behind it is taken
    tracker.close(failed=False)
    assert len(words.messages) == 2 and words.messages[1] == "MLflow lacks 1000 records; metrics.jsonl has them"


@pytest.mark.parametrize(("steps", "seconds"), [(10, 40.0), (4, 1.0)])
def test_a_record_that_is_refused_holds_up_no_other(
    words: pytest.LogCaptureFixture, steps: int, seconds: float
) -> None:
    """Catches one record that a tracker never takes, behind which all others wait: during the run, and at its end."""
    now = 0.0
    server = Server()
    server.refused = {3}
    tracker = PatientTracker("MLflow", server, lambda: now)
    for step in range(1, steps + 1):
        now = seconds * step
        tracker.log(step, {"loss/loss": 1.0})
    before_the_end = len(server.records)
    tracker.close(failed=False)
    assert [step for step, _ in server.records] == [step for step in range(1, steps + 1) if step != 3]
    assert before_the_end == (9 if steps == 10 else 2)
    assert [line.split(";")[0] for line in words.messages] == [
        "MLflow fails (ValueError: invalid name)", "MLflow lacks 1 records",
    ]  # fmt: skip


def test_mlflow_gets_names_that_it_takes() -> None:
    """Catches a set with a + in its name, which MLflow refuses as the name of a metric and of a parameter."""
    assert allowed_name("evaluation/a+b/audio_accuracy") == "evaluation/a_b/audio_accuracy"
    assert allowed_name("data.train.a-b c:1/2.weight") == "data.train.a-b c:1/2.weight"


def test_an_id_is_kept(tmp_path: Path) -> None:
    """Catches a resumed run that becomes another one in its tracker, and two runs with one id."""
    first = kept_id(tmp_path / "a" / "run_id")
    assert kept_id(tmp_path / "a" / "run_id") == first != kept_id(tmp_path / "b" / "run_id")
