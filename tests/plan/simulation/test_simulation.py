"""Simulated pipelines and steps against closed formulas, where there are any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.plan import GPUS, make_work, published
from megatron_cord.plan.simulation.pipeline import run_joint_pipeline, run_pipeline
from megatron_cord.plan.simulation.rates import Rates
from megatron_cord.plan.simulation.scaling import scale
from megatron_cord.plan.simulation.step import simulate
from megatron_cord.plan.trace.records import Collective, PhaseTrace, RankTrace
from megatron_cord.trainer.config import RunConfig

ARCH = published("qwen2_audio_7b")


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 5), (2, 1), (4, 4), (4, 9), (8, 3)])
def test_a_pipeline_of_equal_stages(stages: int, microbatches: int) -> None:
    """Catches a schedule with a bubble of another size than (stages - 1) forward and backward passes."""
    forward, backward = 1.0, 2.0
    ran = run_pipeline([forward] * stages, [backward] * stages, microbatches)
    assert ran.seconds == pytest.approx((microbatches + stages - 1) * (forward + backward))
    assert ran.idle == pytest.approx((stages - 1) * (forward + backward))
    assert run_pipeline([forward] * stages, None, microbatches).seconds == pytest.approx(microbatches + stages - 1)


def test_interleaved_stages() -> None:
    """Catches a bubble that does not shrink with the number of chunks: (stages - 1) passes of a chunk."""
    ran = run_pipeline([1.0] * 4, [2.0] * 4, 8, chunks=2)
    assert ran.idle == pytest.approx(3 * (1.0 + 2.0) / 2)
    assert run_pipeline([1.0] * 4, None, 8, chunks=2).seconds == pytest.approx(8 + 3 / 2)
    assert run_pipeline([1.0] * 2, [2.0] * 2, 3, chunks=2).seconds >= 3 * 3.0  # a last group that does not divide
    one, four = (run_pipeline([1.0] * 4, [2.0] * 4, count, chunks=2) for count in (1, 4))
    assert one == four  # filled up


def test_a_slow_stage_sets_the_pace() -> None:
    """Catches stages that do not wait for each other: all but the first and last passes wait for the slow one."""
    ran = run_pipeline([1.0, 3.0, 1.0], [2.0, 6.0, 2.0], 10)
    assert ran.seconds == pytest.approx(1 + 10 * 9 + 2)
    late = run_pipeline([1.0, 1.0], [2.0, 2.0], 4, send=0.5)
    assert late.seconds > run_pipeline([1.0, 1.0], [2.0, 2.0], 4).seconds


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 5), (4, 3), (4, 9), (8, 20)])
def test_a_loss_of_all_stages(stages: int, microbatches: int) -> None:
    """Catches a schedule in which stages wait between two losses, or whose bubble is larger than that of 1F1B."""
    ran = run_joint_pipeline([1.0] * stages, [2.0] * stages, 0.5, microbatches)
    assert ran.seconds == pytest.approx((microbatches + stages - 1) * (1.0 + 2.0) + microbatches * 0.5)
    # The same loss on the last stage alone takes as many times longer there, and the others wait.
    alone = run_pipeline([1.0] * (stages - 1) + [1.0 + 0.5 * stages], [2.0] * stages, microbatches)
    assert ran.seconds <= alone.seconds and (microbatches < stages or ran.seconds < 0.95 * alone.seconds)


def trace(stage: int = 0, tp: int = 2) -> RankTrace:
    """Return a made-up trace of 16 sequences in 4 microbatches."""
    sent = (
        Collective("all_gather", "tp", tp, False, 400, 10**10),
        Collective("reduce_scatter", "tp", tp, True, 400, 10**10),
        Collective("send", "pp", 2, False, 8, 10**8),
    )
    phases = {
        "teacher": PhaseTrace(1e14, 0.0, 1, 0, ()),
        "forward_backward": PhaseTrace(2e14, 4e14, 1, 0, sent),
    }
    state = {"weights": 2 * 10**9, "gradients": 4 * 10**9}
    return RankTrace(stage, 0, 8, 10**9, 10**9, state, 16, 16, 4, 4, phases, 0.0)


def configured(*more: str) -> RunConfig:
    """Return a run's configuration of 64 sequences."""
    settings = [
        "output_dir=x", "model.checkpoint=x", "data.train=x", "data.evaluation=x", "train.micro_batch_size=4",
        "rollout.prompts_per_step=64", "objective.policy_gradient.enabled=false", "parallel.tp=2",
    ]  # fmt: skip
    return load_config(RunConfig, None, [*settings, *more])


def step(config: RunConfig, gpus: int = 8, rollout_gpus: int = 0, **options: Any) -> Any:
    """Simulate the slow end."""
    work = make_work(config, ARCH, gpus)
    traces = [trace(stage) for stage in range(config.parallel.pp)]
    return simulate(config, ARCH, traces, work, GPUS["h100"], gpus, rollout_gpus, options.get("end", "slow"))


def test_seconds_of_passes_are_operations_and_bytes_over_rates() -> None:
    """Catches a factor: what a rank computes and sends, over what one GPU and its link do."""
    rates = Rates.of(GPUS["h100"])
    made = step(configured())
    operations = rates.peak.slow * rates.products.slow
    sent = 2 * 10**10 / 2 / (rates.link.slow * rates.transport.slow) + 800 * rates.latency.slow
    moved = 10**9 / (rates.memory.slow * rates.memory_share.slow)  # a byte of each parameter; of 4 microbatches
    assert made.seconds["forward_backward"] == pytest.approx(6e14 / operations + 4 * 16 * moved + sent)
    assert made.seconds["teacher"] == pytest.approx(1e14 / operations + 4 * 2 * moved)
    reduced = 4e9 * 3 / 4 / (rates.link.slow * rates.transport.slow) + rates.latency.slow
    assert made.seconds["gradient_reduction"] == pytest.approx(reduced)
    assert made.bubble == pytest.approx(0, abs=1e-9) and made.stragglers > 0
    assert step(configured(), end="fast").total < made.total


def test_what_runs_beside_something_else_is_not_added() -> None:
    """Catches rollouts ahead, overlapped reductions and asynchronous checkpoints that still cost their whole time."""
    plain = step(configured())
    hidden = step(configured("optimizer.overlap_communication=true"))
    assert hidden.seconds["gradient_reduction"] == 0 and hidden.total < plain.total
    ahead = step(configured("rollout.schedule.ahead=1"))
    rest = sum(value for name, value in ahead.seconds.items() if name not in ("rollout", "checkpoint"))
    assert ahead.total - ahead.seconds["checkpoint"] == pytest.approx(max(ahead.seconds["rollout"], rest))
    waiting = step(configured("checkpoint.asynchronous=false"))
    assert waiting.seconds["checkpoint"] > 2 * plain.seconds["checkpoint"]
    assert step(configured("parallel.pp=2")).bubble > 0


def test_a_step_of_more_gpus() -> None:
    """Catches a batch that does not grow, groups over machines at NVLink's rate, and stragglers that stay few."""
    config = configured()
    small, large = scale(config, ARCH, [trace()], GPUS["h100"], [8, 1024], 4)
    assert (large.sequences, large.rollout_gpus) == (128 * small.sequences, 512)
    assert large.slow.seconds["forward_backward"] == pytest.approx(small.slow.seconds["forward_backward"])
    assert large.slow.seconds["gradient_reduction"] > 5 * small.slow.seconds["gradient_reduction"]
    assert large.slow.stragglers > small.slow.stragglers
    assert large.mfu[0] < small.mfu[0] < small.mfu[1] < 1
    assert replace(large, gpus=8) != small


def test_every_rate_says_where_it_is_from() -> None:
    """Catches a rate that is called published and has a range, and one without a source."""
    for gpu in GPUS.values():
        for rate in Rates.of(gpu).all():
            assert rate.source and rate.unit is not None
            assert (rate.kind == "assumed") == (rate.slow != rate.fast), rate.name
