"""Dealing and packing against what must hold of every result, and against the best by trying all."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.trainer.step.packing import balance, pack

REPEATABLE = settings(max_examples=60, derandomize=True, deadline=None)
COSTS = st.lists(st.integers(1, 30), max_size=7)


@REPEATABLE
@given(costs=COSTS, bins=st.integers(1, 3))
def test_balance(costs: list[int], bins: int) -> None:
    """Catches an item lost or doubled, and a deal worse than the bound that the docstring gives."""
    dealt = balance(costs, bins)
    assert len(dealt) == bins and sorted(item for items in dealt for item in items) == list(range(len(costs)))
    assert all(items == sorted(items) for items in dealt)
    best = min(
        max(sum(c for c, b in zip(costs, bin_of, strict=True) if b == n) for n in range(bins))
        for bin_of in product(range(bins), repeat=len(costs))
    )
    assert max(sum(costs[item] for item in items) for items in dealt) <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9


def test_equal_items_are_dealt_evenly() -> None:
    """Catches a rank without work while another has two: ties go to the bin with fewer items."""
    assert [len(items) for items in balance([5] * 8, 4)] == [2, 2, 2, 2]
    assert [len(items) for items in balance([0] * 4, 4)] == [1, 1, 1, 1]


@REPEATABLE
@given(lengths=COSTS, budget=st.integers(5, 40))
def test_pack(lengths: list[int], budget: int) -> None:
    """Catches an item lost or doubled, a box over its budget, and boxes that could be poured together."""
    boxes = pack(lengths, budget)
    assert sorted(item for box in boxes for item in box) == list(range(len(lengths)))
    totals = [sum(lengths[item] for item in box) for box in boxes]
    assert all(total <= budget or len(box) == 1 for total, box in zip(totals, boxes, strict=True))
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])
