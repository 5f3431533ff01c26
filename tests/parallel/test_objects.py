"""Plain values between ranks."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel import objects
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import all_gather_json, broadcast_json, run_on_main
from tests.gloo import run_ranks
from tests.parallel.three_ranks import seen, values


def test_gather() -> None:
    """Catches values out of order, truncated or padded to another length, and floats or letters that JSON changes."""
    for rank in seen():
        assert repr(rank.gathered) == repr([values(0), values(1), values(2)])  # repr, as NaN is not equal to itself
        assert math.isnan(rank.gathered[1]["größe"][2])


def test_gather_in_a_group() -> None:
    """Catches a gathering over all ranks where a group was meant."""
    pair = [[0, "in group"], [1, "in group"]]
    assert [rank.gathered_in_group for rank in seen()] == [pair, pair, [[2, "in group"]]]


def test_broadcast() -> None:
    """Catches a value of another rank than the source."""
    assert [rank.received for rank in seen()] == [{"from": 2}] * 3


def test_what_is_not_json_is_refused() -> None:
    """Catches a fall-back to pickle, and a rank that waits for one that failed."""
    assert all(rank.not_json for rank in seen())


def test_one_rank_gets_what_several_would() -> None:
    """Catches a shortcut for one rank that hides until a second one comes."""
    initialize(ParallelConfig(), seed=0)
    try:
        assert all_gather_json((1, {2: "x"})) == [[1, {"2": "x"}]]
        assert broadcast_json((1,)) == [1]
    finally:
        finalize()
    assert not dist.is_initialized()


def waiting(rank: int) -> list[str]:
    """Return what a rank sees of work on rank 0 that takes three times as long as a collective may."""
    limit = timedelta(seconds=1)
    impatient = dist.new_group([0, 1], timeout=limit)
    dist.distributed_c10d._set_pg_timeout(limit)
    objects._TICK = 0.1
    asked: list[int] = []

    def slow() -> list[int]:
        asked.append(rank)
        time.sleep(3)
        return [rank, 7]

    def refuses() -> None:
        raise CordError("no server")

    def breaks() -> None:
        raise ValueError("a fault")

    def outcome(work: Any) -> str:
        try:
            return str(run_on_main(work))
        except (CordError, RuntimeError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    seen = [outcome(work) for work in (slow, refuses, breaks)]
    if rank == 0:
        time.sleep(2)
        seen.append("")
    else:
        try:
            dist.barrier(impatient)
            seen.append("waited")
        except RuntimeError:
            seen.append("gave up")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
    return [*seen, str(asked)]


def test_ranks_wait_for_the_first_longer_than_a_collective_may() -> None:
    """Catches ranks that wait in a collective: here one may take a second, as "gave up" shows, on NCCL ten minutes.

    It also catches an error that reaches rank 0 alone, and work on other ranks.
    """
    first, second = run_ranks(waiting, 2)
    assert first == ["[0, 7]", "CordError: no server", "ValueError: a fault", "", "[0]"]
    assert second == ["[0, 7]", "CordError: no server", "RuntimeError: rank 0 failed: a fault", "gave up", "[]"]


def test_one_rank_does_the_work_itself() -> None:
    """Catches a rank alone that waits for another, or whose value is another than several ranks would get."""
    initialize(ParallelConfig(), seed=0)
    try:
        assert run_on_main(lambda: (1, 2)) == [1, 2]
    finally:
        finalize()
