"""Packing against what must hold of every result."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.trainer.step.batching.packing import pack

REPEATABLE = settings(max_examples=60, derandomize=True, deadline=None)
LENGTHS = st.lists(st.integers(1, 30), max_size=7)


@REPEATABLE
@given(lengths=LENGTHS, budget=st.integers(5, 40))
def test_pack(lengths: list[int], budget: int) -> None:
    """Catches an item lost or doubled, a box over its budget, and boxes that could be poured together."""
    boxes = pack(lengths, budget)
    assert sorted(item for box in boxes for item in box) == list(range(len(lengths)))
    totals = [sum(lengths[item] for item in box) for box in boxes]
    assert all(total <= budget or len(box) == 1 for total, box in zip(totals, boxes, strict=True))
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])
