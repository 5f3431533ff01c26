"""How a step's rollouts are dealt to mini-batches, and sequences to microbatches of a token budget.

A mini-batch is what an update trains on, the same on every layout; a microbatch is what goes through the model at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cord.rollout.types import ScoredRollout


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


def split_minibatches(rollouts: Sequence[ScoredRollout], count: int) -> list[list[int]]:
    """Deal the step's rollouts to mini-batches, in the order of their samples; a group stays together.

    Responses of L_tok alone and groups are dealt apart, each kind evenly, so the two losses keep their proportion. A
    stretch of samples makes a mini-batch, so data-parallel ranks, which hold every DP-th sample, have equal shares.

    Args:
        rollouts: of the step on all data-parallel ranks; those of replaced groups are in no mini-batch.
        count: of mini-batches.

    Returns:
        for each mini-batch the indices of its rollouts, ascending; none where there are fewer samples than
        mini-batches.
    """
    minibatches: list[list[int]] = [[] for _ in range(count)]
    for grouped in (False, True):
        members = [i for i, r in enumerate(rollouts) if (r.draw > 0) == grouped and (r.distilled or r.in_group)]
        positions = sorted({rollouts[i].position for i in members})
        number = {position: place * count // len(positions) for place, position in enumerate(positions)}
        for i in members:
            minibatches[number[rollouts[i].position]].append(i)
    return [sorted(minibatch) for minibatch in minibatches]
