"""The training step and what surrounds it on a pretended GPU: no fault, and no more waits than budgeted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretend_gpu.budgets import CONTEXT_PARALLEL, TENSOR_PARALLEL
from tests.pretend_gpu.jobs import Jobs
from tests.pretend_gpu.runs import settings
from tests.tiny_run import write_checkpoint, write_inputs


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_a_run_with_threads(jobs: Jobs, inputs: Path, tmp_path: Path) -> None:
    """Catches faults in a whole run on one GPU, in its loader, its rollouts ahead and its checkpoints.

    Also waits for each microbatch, and an evaluation of what was saved.
    """
    output = tmp_path / "run"
    run = settings(inputs, output, "rollout.schedule.ahead=1", "data.workers=1", "train.micro_batch_size=1")
    (outcome,) = jobs.run("train", run)
    assert outcome.microbatches["update"] >= 8 and outcome.steps["update"] == 2
    outcome.check_waits()
    assert any(wait.phase == "thread rollouts" for wait in outcome.waits)
    jobs.run("evaluate", run)


@pytest.mark.slow
def test_other_layouts_of_a_run(jobs: Jobs, inputs: Path, tmp_path: Path) -> None:
    """Catches faults of packed sequences, a moving teacher in host memory, sharded tensors, and a resume as these."""
    output = tmp_path / "run"
    packed = ("train.packing=packed", "teacher.mode=ema", "teacher.offload=true", "model.dtype=bfloat16")
    (outcome,) = jobs.run("train", settings(inputs, output, *packed, "train.steps=1"))
    outcome.check_waits()
    sharded = settings(inputs, output, *packed, "parallel.tp=2", "parallel.sequence_parallel=true")
    for outcome in jobs.run("train", sharded, ranks=2):
        outcome.check_waits(TENSOR_PARALLEL)


@pytest.mark.slow
def test_context_parallelism(jobs: Jobs, inputs: Path, tmp_path: Path) -> None:
    """Catches indices that are made on the host for each layer."""
    run = settings(inputs, tmp_path / "run", "parallel.cp=2", "train.packing=packed", "train.steps=1")
    for outcome in jobs.run("train", run, ranks=2):
        outcome.check_waits(CONTEXT_PARALLEL)


@pytest.mark.slow
def test_weight_sync(jobs: Jobs, tmp_path: Path) -> None:
    """Catches buckets that are sent before they are filled, and tensors sent from the wrong memory."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hidden_size=128, ffn_size=1024, layers=4)
    jobs.run("weight_sync", [str(checkpoint), str(tmp_path), "1"])
