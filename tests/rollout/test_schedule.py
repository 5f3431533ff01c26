"""When responses are generated: staleness, unfinished ones at a weight sync, and what a resumed run takes up."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.schedule import Schedule, ScheduleConfig, staleness
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout, VersionSpan, WeightSource
from megatron_cord.rollout.weights import PlainWeights


class SteppedEngine:
    """Answers with its version at once, or, of step ``held``, when it is released or aborted."""

    def __init__(self, held: int | None = None) -> None:
        self.version, self.held = 0, held
        self.asked: list[tuple[int, int]] = []  #: (step, version) of each call
        self.entered, self.released, self.aborted = threading.Event(), threading.Event(), False

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        step, version = int(requests[0].prompt.sample_id), self.version
        self.asked.append((step, version))
        if step == self.held:
            self.held = None
            self.entered.set()
            assert self.released.wait(30)
            if self.aborted:
                return [Rollout(r.prompt.sample_id, (), (), "abort", (), "") for r in requests]
        return [Rollout(r.prompt.sample_id, (5,), (-0.5,), "stop", (VersionSpan(0, 1, version),), "") for r in requests]

    def update_weights(self, source: WeightSource, version: int) -> None:
        self.version = version

    def abort(self) -> None:
        self.aborted = True
        self.released.set()

    def close(self) -> None:
        self.released.set()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    initialize(ParallelConfig(), seed=0)
    yield
    finalize()


def requests(step: int) -> list[GenerationRequest]:
    return [GenerationRequest(Prompt(str(step), (1,)), 1.0, 1, seed) for seed in range(2)]


def make(engine: Any, steps: int = 5, **config: Any) -> Schedule[int]:
    """Make a schedule whose batches are the steps' numbers."""
    settings = ScheduleConfig(**{"ahead": 1} | config)
    return Schedule(settings, CollectiveEngine(engine), lambda step: step, requests, steps)


def sync_weights(schedule: Schedule[int], engine: SteppedEngine, version: int) -> None:
    with schedule.syncing_weights():
        engine.update_weights(PlainWeights({}), version)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_each_step_has_weights_of_the_promised_age(ahead: int) -> None:
    """Catches responses of other weights than max(0, step - ahead), which would depend on timing.

    Also steps that are asked for twice or never.
    """
    engine = SteppedEngine()
    schedule = make(engine, ahead=ahead)
    for step in range(5):
        rollouts, metrics = schedule.rollouts(step)
        wanted = max(0, step - ahead)
        assert [(r.prompt_id, r.versions[0].version) for r in rollouts] == [(str(step), wanted)] * 2
        assert staleness(rollouts, step, ahead) == {"staleness": step - wanted, "staleness_max": step - wanted}
        assert {"seconds_generate", "seconds_wait_rollouts", "seconds_wait_weight_sync"} == metrics.keys()
        sync_weights(schedule, engine, step + 1)
    assert engine.asked == [(step, max(0, step - ahead)) for step in range(5)]
    schedule.close()


def test_a_weight_sync_waits_for_what_is_being_generated() -> None:
    """Catches weights that change under a response."""
    engine = SteppedEngine(held=1)
    schedule = make(engine)
    schedule.rollouts(0)
    assert engine.entered.wait(30)
    threading.Timer(0.2, engine.released.set).start()
    sync_weights(schedule, engine, 1)
    assert [r.versions[0].version for r in schedule.rollouts(1)[0]] == [0, 0]
    schedule.close()


def test_aborted_responses_begin_again_with_the_new_weights() -> None:
    """Catches an unfinished response that is trained on, lost, or waited for."""
    engine = SteppedEngine(held=1)
    schedule = make(engine, on_weight_sync="restart")
    schedule.rollouts(0)
    assert engine.entered.wait(30)
    sync_weights(schedule, engine, 1)
    assert [(r.finish_reason, r.versions[0].version) for r in schedule.rollouts(1)[0]] == [("stop", 1)] * 2
    assert engine.asked[:3] == [(0, 0), (1, 0), (1, 1)]
    schedule.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_are_opened_once_and_let_go(ahead: int) -> None:
    """Catches a batch that is read or prepared again when its step comes, one that is held after its step.

    Also too many held at once.
    """
    opened: list[int] = []

    def batch(step: int) -> int:
        opened.append(step)
        return step

    schedule = Schedule(ScheduleConfig(ahead=ahead), CollectiveEngine(SteppedEngine()), batch, requests, 6)
    for step in range(6):
        assert schedule.batch(step) == step and len(schedule._open) <= ahead + 1
        schedule.rollouts(step)
        assert step not in schedule._open
        with schedule.syncing_weights():
            pass
        schedule._engine.update_weights(PlainWeights({}), step + 1)
    assert opened == list(range(6))
    schedule.close()


def test_what_was_generated_ahead_is_taken_up() -> None:
    """Catches a resumed run that asks newer weights for what older ones had answered.

    Also takes up what its configuration does not allow.
    """
    engine = SteppedEngine()
    schedule = make(engine)
    schedule.rollouts(0)
    sync_weights(schedule, engine, 1)
    ahead = schedule.settle()
    assert list(ahead) == [1] and schedule.rollouts(1)[0] == list(ahead[1].values()), "settling must not lose them"
    assert list(ahead[1]) == [request.key for request in requests(1)]
    schedule.close()
    for config, version in (({}, 0), ({"ahead": 0}, 1)):
        resumed = SteppedEngine()
        resumed.version = 1
        again = make(resumed, **config)
        again.restore(ahead, 1)
        assert [r.versions[0].version for r in again.rollouts(1)[0]] == [version] * 2
        again.close()


class LosingEngine(SteppedEngine):
    """Makes only responses of seed 0 while it is lost; gets back by `recover`, or by new weights."""

    def __init__(self, lost: bool) -> None:
        super().__init__()
        self.lost, self.recovered = lost, 0

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        rollouts = super().generate(requests)
        if not self.lost:
            return rollouts
        asked = zip(requests, rollouts, strict=True)
        return [
            replace(r, token_ids=(), logprobs=(), finish_reason="abort", versions=()) if q.seed else r for q, r in asked
        ]

    def update_weights(self, source: WeightSource, version: int) -> None:
        super().update_weights(source, version)
        self.lost = False

    def recover(self) -> None:
        self.recovered += 1
        self.lost = False


def test_an_engine_that_is_lost_recovers_at_its_step() -> None:
    """Catches a run that stops with its last server, responses that are asked for twice.

    Also a recovery where none is needed.
    """
    for ahead in (0, 1):
        engine = LosingEngine(lost=True)
        making = make(engine, ahead=ahead)
        assert [r.finish_reason for r in making.rollouts(0)[0]] == ["stop"] * 2
        assert engine.recovered == 1 and engine.asked.count((0, 0)) == 2
        making.close()


def test_a_weight_sync_brings_a_lost_engine_back() -> None:
    """Catches responses of a later step that wait for their engine although new weights have brought it back."""
    engine = LosingEngine(lost=False)
    schedule = make(engine)
    schedule.rollouts(0)
    schedule.wait()
    engine.lost = True
    schedule._open[1].made.clear()
    schedule._submit(schedule._open[1])  # step 1 again, by an engine that is lost
    schedule.wait()
    assert len(schedule._open[1].made) == 1
    sync_weights(schedule, engine, 1)
    assert [r.versions[0].version for r in schedule.rollouts(1)[0]] == [0, 1]
    assert engine.recovered == 0
    schedule.close()


def test_an_engine_that_cannot_recover_stops_the_run() -> None:
    """Catches endless repetition, and responses that were cut off in silence."""
    engine = LosingEngine(lost=True)
    engine.recover = lambda: None  # type: ignore[method-assign]
    with pytest.raises(
        CordError, match=r"1 responses are still missing .* 3 times in a row, on this rank of samples 0"
    ):
        make(engine, ahead=0).rollouts(0)


def test_failures_and_old_weights_are_reported() -> None:
    """Catches an engine that missed a weight sync unnoticed, an error that stays in its thread.

    Also settings that an engine cannot follow.
    """
    engine = SteppedEngine()
    schedule = make(engine)
    schedule.rollouts(0)
    for step in (1, 2):
        with schedule.syncing_weights():
            pass  # never reaches the engine
        if step == 1:
            schedule.rollouts(1)
    with pytest.raises(
        CordError, match="sample 2: the engine generated with weights of version 0 at step 2, where 1 to 2 are allowed"
    ):
        schedule.rollouts(2)
    schedule.close()
    for config, message in (
        ({"on_weight_sync": "continue"}, "on_weight_sync=continue needs an engine that is Pausable"),
        ({"ahead": 0, "colocated": True}, "rollout.schedule.colocated needs an engine that is Releasable"),
    ):
        with pytest.raises(CordError, match=message):
            make(SteppedEngine(), **config)
    with pytest.raises(CordError, match=r"colocated needs rollout.schedule.ahead=0"):
        ScheduleConfig(ahead=1, colocated=True)

    def broken(requests: Sequence[GenerationRequest]) -> list[Rollout]:
        raise CordError("the engine is broken")

    engine.generate = broken  # type: ignore[method-assign]
    failing = make(engine)
    with pytest.raises(CordError, match="the engine is broken"):
        failing.rollouts(0)
    failing.close()


def test_the_trainer_gives_up_its_cache_before_a_colocated_engine_takes_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a server that finds its memory in the cache of torch's allocator, on any rank.

    Also a rank that trains before the server has freed its memory.
    """
    events: list[str] = []

    class ReleasableEngine(SteppedEngine):
        def release_memory(self) -> None:
            events.append("release")

        def restore_memory(self) -> None:
            events.append("restore")

    schedule = make(ReleasableEngine(), ahead=0, colocated=True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    monkeypatch.setattr("megatron_cord.rollout.schedule.all_gather_json", lambda _: events.append("meet"))
    with schedule.training():
        events.append("train")
    assert events == ["release", "meet", "train", "empty", "meet", "restore"]
    events.clear()
    with make(SteppedEngine(), ahead=0).training():
        pass
    assert events == []


def test_colocated_servers_need_a_transport_that_works() -> None:
    """Catches a run that ends at its first weight sync: NCCL refuses two ranks on one GPU."""
    sglang = SGLangConfig(servers=("http://127.0.0.1:30000",))
    colocated = ScheduleConfig(colocated=True)
    with pytest.raises(CordError, match=r"set rollout.weight_sync.transport to shared_memory, or to disk"):
        RolloutConfig(engine="sglang", sglang=sglang, schedule=colocated)
    for transport in ("shared_memory", "disk"):
        weight_sync = WeightSyncConfig(transport=transport)
        RolloutConfig(engine="sglang", sglang=sglang, schedule=colocated, weight_sync=weight_sync)
