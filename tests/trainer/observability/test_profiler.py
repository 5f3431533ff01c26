"""Profiles of a run's steps, read back."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.profiler import ProfileConfig, Profiler
from tests.tiny_run import overrides
from tests.trainer.endings.test_train_ends import broken_inputs
from tests.trainer.runs.test_train import alone

PHASES = ("rollout", "reward", "update", "teacher", "forward_backward", "optimizer", "weight_sync", "record")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace."""
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def spans_of(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return begin and end of each of our spans, in microseconds."""
    ours = [event for event in events if event.get("name", "").startswith("cord.") and event["ph"] == "X"]
    return {event["name"].removeprefix("cord."): (event["ts"], event["ts"] + event["dur"]) for event in ours}


def test_a_trace_has_the_phases_and_all_threads(inputs: Path, tmp_path: Path) -> None:
    """Catches a trace of another step, one without a phase or with a phase outside the one that contains it.

    Also one without the operations of responses that are generated ahead.
    """
    settings = ("train.steps=4", "train.profile.steps=[2]", "rollout.schedule.ahead=1")
    run = alone(inputs, tmp_path / "run", *settings)
    (path,) = (run / "profile").iterdir()
    assert path.name == "step000002-rank00000.pt.trace.json.gz"
    events = read_trace(path)
    spans = spans_of(events)
    assert spans.keys() == set(PHASES)
    for inner in ("teacher", "forward_backward", "optimizer"):
        assert spans["update"][0] <= spans[inner][0] < spans[inner][1] <= spans["update"][1]
    assert [
        spans[name] for name in PHASES if name in ("rollout", "reward", "update", "weight_sync", "record")
    ] == sorted(spans[name] for name in ("rollout", "reward", "update", "weight_sync", "record"))
    threads = {event["tid"] for event in events if event.get("name") == "aten::mm"}
    assert len(threads) >= 2


def test_a_step_that_fails_leaves_its_trace(inputs: Path, tmp_path: Path) -> None:
    """Catches a profile that is lost with the step that it was to explain."""
    broken = broken_inputs(inputs, tmp_path / "inputs")
    with pytest.raises(CordError, match="2 steps in a row had no finite loss"):
        alone(broken, tmp_path / "run", "train.profile.steps=[2]", "train.max_skipped_in_a_row=2")
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert {"rollout", "update", "record"} <= spans_of(read_trace(path)).keys()


@pytest.mark.parametrize(
    ("chosen", "step", "rank", "written"),
    [
        (ProfileConfig(steps=(3,)), 3, 0, True),
        (ProfileConfig(steps=(3,)), 2, 0, False),
        (ProfileConfig(steps=(3,)), 3, 1, False),
        (ProfileConfig(steps=(3,), ranks=(1,)), 3, 1, True),
        (ProfileConfig(), 3, 0, False),
    ],
)
def test_what_is_not_chosen_is_not_recorded(
    chosen: ProfileConfig, step: int, rank: int, written: bool, tmp_path: Path
) -> None:
    """Catches a file of each step or of each rank."""
    profiler = Profiler(chosen, tmp_path, rank, world_size=2)
    profiler.begin(step)
    torch.ones(2).sum()
    profiler.end()
    profiler.end()
    assert (tmp_path / "profile" / f"step{step:06d}-rank{rank:05d}.pt.trace.json.gz").exists() == written
    assert written or not list(tmp_path.iterdir())


def test_memory_is_recorded(tmp_path: Path) -> None:
    """Catches a trace that says nothing about memory, as torch's of all threads do not."""
    profiler = Profiler(ProfileConfig(steps=(1,), memory=True), tmp_path, 0, 1)
    profiler.begin(1)
    torch.ones(1000)
    profiler.end()
    (path,) = (tmp_path / "profile").iterdir()
    allocated = [event["args"]["Bytes"] for event in read_trace(path) if event.get("name") == "[memory]"]
    assert 4000 in allocated


def test_shapes_and_stacks_are_recorded(tmp_path: Path) -> None:
    """Catches settings that change nothing."""
    profiler = Profiler(ProfileConfig(steps=(1,), shapes=True, stacks=True), tmp_path, 0, 1)
    profiler.begin(1)
    torch.ones(3, 5) @ torch.ones(5, 2)
    profiler.end()
    (path,) = (tmp_path / "profile").iterdir()
    events = read_trace(path)
    (product,) = [event for event in events if event.get("name") == "aten::mm"]
    assert product["args"]["Input Dims"][:2] == [[3, 5], [5, 2]]
    assert any("test_shapes_and_stacks_are_recorded" in event.get("name", "") for event in events)


def test_on_cuda_a_snapshot_of_memory_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a snapshot that is taken before the history begins or after it ends, and a history that goes on.

    A GPU's own snapshot is that of `make test-gpu`.
    """
    calls: list[tuple[str, object]] = []

    def recorded(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append((name, args[0] if args else kwargs.get("enabled", "all")))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", recorded("history"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", recorded("snapshot"))
    profiler = Profiler(ProfileConfig(steps=(1,), memory=True), tmp_path, 0, 1)
    for step in (1, 2):
        profiler.begin(step)
        profiler.end()
    snapshot = str(tmp_path / "profile" / "step000001-rank00000.memory.pickle")
    assert calls == [("history", "all"), ("snapshot", snapshot), ("history", None)]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.profile.steps=[0]", "train.profile.steps are numbered from 1, got 0"),
        ("train.profile.steps=[2,6]", "train.profile.steps names step 6, and train.steps=5 is the last"),
        ("train.profile={steps: [1], ranks: []}", "train.profile.ranks names no rank"),
        ("train.profile.ranks=[-1]", "train.profile.ranks are numbered from 0, got -1"),
    ],
)
def test_settings_that_cannot_be_meant(setting: str, words: str, inputs: Path, tmp_path: Path) -> None:
    """Catches a run that trains for hours and writes no profile."""
    with pytest.raises(CordError, match=words):
        load_config(RunConfig, None, overrides(inputs, tmp_path, setting))


def test_a_rank_that_the_run_does_not_have(tmp_path: Path) -> None:
    """Catches a profile that nobody writes."""
    with pytest.raises(CordError, match=r"train.profile.ranks names rank 2, and the run has 2 ranks, from 0"):
        Profiler(ProfileConfig(steps=(1,), ranks=(0, 2)), tmp_path, 0, world_size=2)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Catches a traceback where the profile cannot be written."""
    (tmp_path / "profile").write_text("a file where the directory should be")
    profiler = Profiler(ProfileConfig(steps=(1,)), tmp_path, 0, 1)
    profiler.begin(1)
    with pytest.raises(CordError, match=r"step000001-rank00000.*cannot write the profile: .*train.profile.steps"):
        profiler.end()


def test_a_profile_that_cannot_be_written_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a failed step whose own error is replaced by that of its profile."""
    (tmp_path / "profile").write_text("a file where the directory should be")
    profiler = Profiler(ProfileConfig(steps=(1,)), tmp_path, 0, 1)
    profiler.begin(1)
    profiler.close()
    assert "the profile of step 1 is lost: " in caplog.text
