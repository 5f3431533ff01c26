"""The rules of the pretended GPU themselves: each of them can fail, and none fails for what CUDA allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretend_gpu.jobs import Jobs
from tests.pretend_gpu.runs import settings
from tests.tiny_run import write_inputs

SEEDED = "tests.pretend_gpu.seeded"


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.mark.parametrize("table", ["check_faults", "check_waits", "check_allowed"])
def test_rules(jobs: Jobs, table: str) -> None:
    """Catches a rule that finds nothing, a wait that is missed or counted twice, and rules stricter than CUDA's."""
    (outcome,) = jobs.try_run(f"{SEEDED}:{table}", [])
    assert not outcome.error, outcome.error


@pytest.mark.slow
def test_faults_in_the_product(jobs: Jobs, tmp_path: Path) -> None:
    """Catches rules that hold for examples alone: faults put into the trainer fail its run, waits exceed its budget."""
    inputs = write_inputs(tmp_path)
    one_step = settings(inputs, tmp_path / "flag", "train.steps=1")
    (outcome,) = jobs.try_run(f"{SEEDED}:flag_on_the_host", one_step)
    assert "NCCL allreduce_ of a host tensor" in outcome.error
    ema = ("teacher.mode=ema", "teacher.offload=true", "model.dtype=bfloat16", "checkpoint.interval=0")
    moving = settings(inputs, tmp_path / "average", *ema)
    (outcome,) = jobs.try_run(f"{SEEDED}:average_without_order", moving)
    assert "another stream still uses" in outcome.error
    (outcome,) = jobs.run(f"{SEEDED}:blocking_copies", settings(inputs, tmp_path / "copies", "train.steps=1"))
    with pytest.raises(AssertionError, match="copy to the device, pageable memory"):
        outcome.check_waits()
