"""How sequences are put into microbatches of a token budget. Plain lists of numbers in and out."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few boxes of the budget as first-fit decreasing finds.

    First-fit decreasing needs at most 11/9 of the fewest, plus 6/9 (Dósa 2007).

    Args:
        lengths: of each item.
        budget: the largest sum of lengths in a box; an item that is longer alone gets a box of its own.

    Returns:
        for each box the items' indices in ascending order.
    """
    boxes: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        box = next((number for number, left in enumerate(room) if lengths[item] <= left), None)
        if box is None:
            box = len(boxes)
            boxes.append([])
            room.append(budget)
        boxes[box].append(item)
        room[box] -= lengths[item]
    return [sorted(items) for items in boxes]
