"""Runs with interleaved stages, or a loss on all stages: as on one rank, and resumed from and on other layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gloo import run_ranks
from tests.tiny_run import losses, write_checkpoint, write_inputs
from tests.trainer.runs.test_train import alone, run_all

INTERLEAVED = ("parallel.pp=2", "parallel.virtual_pp=2")
JOINT = ("parallel.pp=2", "parallel.vocabulary_over_stages=true")
#: As tests.trainer.runs.test_train.RUNS; "one" is made on one rank before.
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "interleaved": (None, INTERLEAVED),
    "tp2 from interleaved": ("interleaved", ("parallel.tp=2",)),
    "interleaved from one": ("one", INTERLEAVED),
    "loss on all stages": (None, JOINT),
    "tp2 from loss on all stages": ("loss on all stages", ("parallel.tp=2",)),
    "loss on all stages from one": ("one", JOINT),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    inputs = write_inputs(root / "inputs")
    write_checkpoint(inputs / "checkpoint", layers=4)
    alone(inputs, root / "one", "checkpoint.interval=2", "checkpoint.keep=0")
    run_ranks(run_all, 2, str(inputs), str(root), RUNS)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_on_other_stages(runs: Path, name: str) -> None:
    """Catches layers, states or weights of the engine that are exchanged where a rank's layers are not neighbours.

    Also parts of an output weight that a checkpoint, or the engine, takes for the whole.
    """
    assert len(losses(runs / name)) == 5
    for got, wanted in zip(losses(runs / name), losses(runs / "one"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
