"""Engines of several ranks used as one."""

from __future__ import annotations

import pytest

from tests.parallel.three_ranks import REQUEST_COUNTS, EchoEngine, requests, seen


@pytest.mark.parametrize("count", REQUEST_COUNTS)
def test_every_rank_gets_all_rollouts_in_order(count: int) -> None:
    """Catches rollouts out of order, lost with uneven shares or fewer requests than ranks, or changed on their way."""
    alone = EchoEngine()
    alone.version = 5
    wanted = alone.generate(requests(count))
    for rank in seen():
        assert rank.rollouts[count] == wanted


def test_requests_are_shared_out() -> None:
    """Catches ranks that all generate everything, or shares that differ by more than one."""
    assert [rank.asked for rank in seen()] == [[0, 1, 1, 3], [0, 0, 1, 2], [0, 0, 1, 2]]


def test_weights_and_closing_reach_every_engine() -> None:
    """Catches an engine that keeps old weights, or is never closed."""
    assert [rank.engine for rank in seen()] == [(5, True)] * 3
