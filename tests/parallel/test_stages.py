"""Which layers a rank holds and in which order it works on them, against Megatron's own schedules."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.parallel.stages import chunks_of_rank, forward_order, group_size, pass_order


def test_each_layer_is_on_one_rank() -> None:
    """Catches a layer on two ranks or on none, and chunks that tokens would pass in another order."""
    stages = ParallelConfig(pp=2, virtual_pp=3).layers_per_stage(12)
    ranks = [chunks_of_rank(stages, 2, rank) for rank in range(2)]
    assert ranks[0] == (range(0, 2), range(4, 6), range(8, 10))
    assert ranks[1] == (range(2, 4), range(6, 8), range(10, 12))
    assert chunks_of_rank(ParallelConfig(pp=4).layers_per_stage(12), 4, 3) == (range(9, 12),)
    uneven = ParallelConfig(pp=2, virtual_pp=2, pipeline_layers=(1, 4, 3, 4)).layers_per_stage(12)
    assert chunks_of_rank(uneven, 2, 0) == (range(1), range(5, 8))
    assert chunks_of_rank(uneven, 2, 1) == (range(1, 5), range(8, 12))


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [4, 5, 6, 7, 11])
def test_order_is_megatrons(pp: int, microbatches: int) -> None:
    """Catches a group that Megatron refuses, or larger than it need be, and passes in another order than its table."""
    size = group_size(microbatches, pp)
    left = microbatches % size
    assert pp <= size <= microbatches and (left == 0 or left >= pp) and size < 2 * pp + 1
    table = get_schedule_table(microbatches, 3, size)
    assert forward_order(microbatches, pp, 3) == [(chunk, number) for number, chunk in table]
    for rank in range(pp):
        order = pass_order(microbatches, pp, 3, rank)
        assert sorted(order) == [(b, c, n) for b in (False, True) for c in range(3) for n in range(microbatches)]
        place = {each: position for position, each in enumerate(order)}
        assert all(place[False, c, n] < place[True, c, n] for c in range(3) for n in range(microbatches))


def test_ranks_work_ahead_of_those_behind_them() -> None:
    """Catches more or fewer forward passes before the first backward pass than Megatron makes."""

    def ahead(rank: int, chunks: int) -> int:
        return next(place for place, each in enumerate(pass_order(8, 4, chunks, rank)) if each[0]) - 1

    assert [ahead(rank, 1) for rank in range(4)] == [3, 2, 1, 0]
    assert [ahead(rank, 2) for rank in range(4)] == [2 * (3 - rank) + 4 for rank in range(4)]
