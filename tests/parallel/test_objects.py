"""Plain values between ranks."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import all_gather_json, broadcast_json
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
