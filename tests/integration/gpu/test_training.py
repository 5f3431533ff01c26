"""Whole runs on a CUDA device, in processes of their own."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest

from tests.tiny_run import finish, metrics, overrides, start
from tests.trainer.observability.test_profiler import PHASES, read_trace, spans_of

pytestmark = pytest.mark.gpu


def train(inputs: Path, output: Path, *settings: str) -> None:
    """Make a run, or go on with it."""
    status, errors = finish(start(overrides(inputs, output, *settings), ranks=1))
    assert status == 0, errors


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.dtype=bfloat16", "train.packing=packed"),
        ("rollout.schedule={ahead: 1, on_weight_sync: continue}",),
        ("teacher={mode: ema, offload: true}",),
        ("optimizer.offload=true",),
    ],
    ids=["default", "bfloat16 packed", "asynchronous", "averages on the host", "moments on the host"],
)
def test_a_run_and_its_resumption(settings: tuple[str, ...], inputs: Path, tmp_path: Path) -> None:
    """Catches a host tensor in a device's collective, a copy that is read too early, an incomplete checkpoint."""
    train(inputs, tmp_path / "run", *settings, "train.steps=2")
    train(inputs, tmp_path / "run", *settings, "train.steps=4")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert math.isfinite(line["loss"]) and not line["skipped"] and line["grad_norm"] > 0
        assert 0 < line["memory_peak_gb"] <= line["memory_reserved_gb"]
        assert 0 < line["seconds_forward_backward"] < line["seconds_update"]
        assert line["engine_logprob_difference"] < 0.1


def test_a_profile_has_kernels_and_a_snapshot(inputs: Path, tmp_path: Path) -> None:
    """Catches a trace of the host alone, and a snapshot without allocations."""
    train(inputs, tmp_path / "run", "train.steps=2", "train.profile={steps: [2], memory: true}")
    trace, snapshot = sorted((tmp_path / "run" / "profile").iterdir(), key=lambda path: path.name.endswith("pickle"))
    events = read_trace(trace)
    assert spans_of(events).keys() == set(PHASES)
    assert any(event.get("cat") == "kernel" for event in events)
    with snapshot.open("rb") as file:  # written by this test's own run a moment ago
        content = pickle.load(file)
    assert any(entry["action"] == "alloc" for trace in content["device_traces"] for entry in trace)
