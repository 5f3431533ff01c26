"""Whole asynchronous runs: what is the same as synchronously, on more ranks, and after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import dump_files
from tests.gloo import run_ranks
from tests.tiny_run import losses, make_run, metrics, overrides, write_inputs
from tests.trainer.fault_ranks import Ranks, run_forked
from tests.trainer.runs.test_train import alone, join, stop_after

AHEAD = "rollout.schedule.ahead=1"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an asynchronous run on one rank."""
    return alone(inputs, tmp_path_factory.mktemp("one") / "run", AHEAD, "checkpoint.keep=0")


def versions(run: Path) -> list[set[int]]:
    """Which versions made the tokens of each step."""
    files = dump_files(run / "rollouts").values()
    return [
        {span["version"] for spans in pq.read_table(file)["versions"].to_pylist() for span in spans} for file in files
    ]


def test_steps_ahead_have_older_weights(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a schedule that changes what is drawn, and one that is never ahead."""
    fresh = alone(inputs, tmp_path / "fresh", "checkpoint.interval=0")
    assert (
        versions(one) == [{0}, {0}, {1}, {2}, {3}]
        and losses(one)[0] == losses(fresh)[0]
        and losses(one)[1] != losses(fresh)[1]
    )
    assert [line["staleness"] for line in metrics(one)] == [0, 1, 1, 1, 1]
    assert "engine_logprob_difference" in metrics(one)[0] and "engine_logprob_difference" not in metrics(one)[1]
    evaluation = json.loads((one / "evaluations" / "step_000005" / "heldout.json").read_text())
    assert evaluation["engine_logprob_difference_max"] < 1e-4


def test_a_resumed_run_is_the_same(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches responses ahead that are generated again with newer weights.

    Also a resumed synchronous run that takes them up.
    """
    assert losses(alone(inputs, stop_after(2, one, tmp_path / "again"), AHEAD)) == losses(one)
    changed = alone(inputs, stop_after(2, one, tmp_path / "changed"))
    assert versions(changed)[2:] == [{2}, {3}, {4}]


@pytest.mark.parametrize("on_weight_sync", ["continue", "restart"])
def test_unfinished_responses(inputs: Path, tmp_path: Path, on_weight_sync: str) -> None:
    """Catches deadlocks between generation and weight sync, and tokens that are older than allowed."""
    run = alone(
        inputs,
        tmp_path / "run",
        AHEAD,
        f"rollout.schedule.on_weight_sync={on_weight_sync}",
        "rollout.max_new_tokens=40",
        "checkpoint.interval=2",
    )
    assert len(losses(run)) == 5
    assert all(step - 1 <= version <= step for step, made in enumerate(versions(run)) for version in made if step)


def two_ranks(rank: int, inputs: str, output: str) -> None:
    dist.destroy_process_group()
    join(rank, Path(output).with_suffix(".store"))
    make_run(overrides(Path(inputs), Path(output), AHEAD))
    join(rank, Path(output).with_suffix(".after"))


@pytest.mark.slow
def test_two_data_parallel_ranks_are_the_same_run(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches collectives from the thread that generates, and shares that are mixed up."""
    run_ranks(two_ranks, 2, str(inputs), str(tmp_path / "run"))
    assert versions(tmp_path / "run") == versions(one)
    for got, wanted in zip(losses(tmp_path / "run"), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches checkpoints without what was generated ahead."""
    output = tmp_path / "run"
    settings = overrides(inputs, output, AHEAD, "checkpoint.interval=1", "checkpoint.keep=3", "train.steps=5")
    rank = Ranks(settings, tmp_path / "killed.log", world=1, halt=5)
    assert rank.wait_for((output / "checkpoints" / "step_000002").exists, 120)
    assert rank.kill(0)
    status, errors = run_forked(settings, tmp_path / "log", world=1)
    assert status == 0 and "resuming after step" in errors
    assert losses(output) == losses(one)


def test_an_engine_that_disagrees_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    """Catches a limit that is never checked."""
    with pytest.raises(
        CordError, match=r"evaluation of step 0: trainer and engine differ .*max_logprob_mismatch is 1e-12"
    ):
        alone(inputs, tmp_path / "run", "rollout.max_logprob_mismatch=1e-12")
