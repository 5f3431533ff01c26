"""How sequences are dealt to data-parallel ranks and put into microbatches of a token budget. Plain lists of numbers in and out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Deals items into bins of similar total cost: the dearest first, each to the bin that has least (Graham 1969).

    The dearest bin is at most 4/3 − 1/(3 · bins) times as dear as in the best deal.

    Args:
        costs: of each item.
        bins: how many.

    Returns:
        for each bin the items' indices in ascending order.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, 0, number) for number in range(bins)]  # cost, items, bin: of equally dear bins the one with fewer items
    for item in _dearest_first(costs):
        cost, items, number = heap[0]
        dealt[number].append(item)
        heapq.heapreplace(heap, (cost + costs[item], items + 1, number))
    return [sorted(items) for items in dealt]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Puts items into as few boxes of the budget as first-fit decreasing finds (at most 11/9 of the best, plus 6/9; Dósa 2007).

    Args:
        lengths: of each item.
        budget: the largest sum of lengths in a box; an item that is longer alone gets a box of its own.

    Returns:
        for each box the items' indices in ascending order.
    """
    boxes: list[list[int]] = []
    room: list[int] = []
    for item in _dearest_first(lengths):
        box = next((number for number, left in enumerate(room) if lengths[item] <= left), None)
        if box is None:
            box = len(boxes)
            boxes.append([])
            room.append(budget)
        boxes[box].append(item)
        room[box] -= lengths[item]
    return [sorted(items) for items in boxes]


def _dearest_first(costs: Sequence[int]) -> list[int]:
    return sorted(range(len(costs)), key=lambda item: (-costs[item], item))
