"""How much a step computed, and how fast, over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_cord.data.samples import Prompt
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.rollout.types import Rollout, ScoredRollout, VersionSpan
from megatron_cord.trainer.observability.throughput import StepWork, measure_throughput
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from tests.gloo import run_ranks

OWN = StepWork(
    generated_tokens=100,
    sequences=4,
    scored=3,
    student_tokens=200,
    teacher_tokens=90,
    response_tokens=80,
    clips=4,
    clip_frames=4000,
)


def utilise(work: StepWork, seconds: float) -> dict[str, float]:
    """Return what the metric is computed from."""
    return {"sequences": float(work.sequences), "clips": float(work.clips), "update": seconds}


def measure(rank: int, tp: int) -> dict[str, float]:
    """Measure a step whose second rank is slower, and has twice the work where it is another replica."""
    layout = initialize(ParallelConfig(tp=tp), seed=0)
    own = StepWork(*(2 * value for value in OWN.__dict__.values())) if layout.dp_rank else OWN
    seconds = {"generate": 2.0, "teacher": 0.5, "forward_backward": 1.0, "update": 2.0}
    slower = {f"seconds_{name}": value * (1 + rank) for name, value in seconds.items()}
    return measure_throughput(own, slower | {"seconds": 10.0}, 1, layout, utilise)


@pytest.mark.parametrize(("tp", "replicas"), [(2, 1), (1, 3)], ids=["one replica", "two replicas, one twice as large"])
def test_replicas_add_up_and_the_slowest_rank_counts(tp: int, replicas: int) -> None:
    """Catches tokens counted once a tensor-parallel rank, and rates of the rank that waits for others."""
    first, second = run_ranks(measure, 2, tp)
    assert first.pop("memory_host_gb") == second.pop("memory_host_gb") > 0
    assert first == second == {
        "tokens_generated": 100 * replicas,
        "tokens_teacher": 90 * replicas,
        "tokens_student": 200 * replicas,
        "tokens_per_second_generate": 100 * replicas / 4,
        "tokens_per_second_teacher": 90 * replicas / 1,
        "tokens_per_second_forward_backward": 200 * replicas / 2,
        "tokens_per_second": 200 * replicas / 10,
        "sequences": 4 * replicas,
        "clips": 4 * replicas,
        "update": 4.0,
    }  # fmt: skip


def test_passes_and_phases_without_tokens(layout: Layout) -> None:
    """Catches a rate of one pass for the seconds of two, and rates of zero where nothing was generated or taught."""
    seconds = dict.fromkeys(("seconds_teacher", "seconds_forward_backward", "seconds_update", "seconds"), 1.0)
    idle = replace(OWN, generated_tokens=0, scored=0, teacher_tokens=0)
    metrics = measure_throughput(idle, seconds, 2, layout, utilise)
    assert metrics["tokens_per_second_forward_backward"] == metrics["tokens_student"] == 400
    assert metrics["tokens_per_second"] == 200
    assert not {"tokens_per_second_generate", "tokens_per_second_teacher"} & metrics.keys()


def test_the_work_of_sequences() -> None:
    """Catches prompts that are left out, and a teacher's tokens where there is no teacher."""
    rollout = Rollout("a", (1, 2, 3), (0.0,) * 3, "stop", (VersionSpan(0, 3, 0),), "")
    student, teacher = Prompt("a", (5,) * 10), Prompt("a", (5,) * 4)
    scored = ScoredRollout(rollout, "distill")
    sequences = [TrainingSequence(student, teacher, scored, 0), TrainingSequence(student, None, scored, 1)]
    assert StepWork.of([rollout] * 5, sequences) == StepWork(
        generated_tokens=15,
        sequences=2,
        scored=1,
        student_tokens=26,
        teacher_tokens=7,
        response_tokens=6,
        clips=0,
        clip_frames=0,
    )
