"""Which of the language model's layers a pipeline rank holds, in chunks.

Tokens pass P · V stages, the v-th round of which goes over all P ranks: rank p holds the stages p, p + P, p + 2P, … as
its V chunks. With V = 1 there is one chunk a rank.
Legend: P pipeline ranks (parallel.pp), V chunks a rank (parallel.virtual_pp).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal


def chunks_of_rank(stages: Sequence[int], pp: int, rank: int) -> tuple[range, ...]:
    """Return the layers, from 0, of each of a rank's chunks.

    Args:
        stages: layers of all P · V stages.
        pp: P.
        rank: in the pipeline, from 0.
    """
    chunks = [range(start, end) for start, end in pairwise(accumulate(stages, initial=0))]
    return tuple(chunks[rank::pp])


def group_size(microbatches: int, pp: int) -> int:
    """Return how many microbatches go through a chunk before the next chunk begins: few, as all are kept in memory.

    Megatron's interleaved schedule takes at least P, and leaves a last group of at least P or none.

    Args:
        microbatches: at least P.
        pp: P.
    """
    return next(n for n in range(pp, microbatches + 1) if microbatches % n == 0 or microbatches % n >= pp)


def forward_order(microbatches: int, pp: int, chunks: int) -> list[tuple[int, int]]:
    """Return the forward passes of a rank in its order, as (chunk, microbatch); the same on all ranks.

    Backward passes come in the same order, but with the last chunk first.
    """
    if chunks == 1:
        return [(0, number) for number in range(microbatches)]
    size = group_size(microbatches, pp)
    return [
        (chunk, number)
        for start in range(0, microbatches, size)
        for chunk in range(chunks)
        for number in range(start, min(start + size, microbatches))
    ]


def pass_order(microbatches: int, pp: int, chunks: int, rank: int) -> list[tuple[bool, int, int]]:
    """Return all passes of a rank in its order, as (backward, chunk, microbatch): Megatron's schedules.

    First as many forward passes as keep the ranks behind it busy, then one forward and one backward pass in turns, then
    the backward passes that are left.
    """
    forward = [(False, *each) for each in forward_order(microbatches, pp, chunks)]
    backward = [(True, chunks - 1 - chunk, number) for _, chunk, number in forward]
    ahead = pp - rank - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * group_size(microbatches, pp)
    ahead = min(ahead, len(forward))
    turns = [each for pair in zip(forward[ahead:], backward, strict=False) for each in pair]
    return [*forward[:ahead], *turns, *backward[len(forward) - ahead :]]


def joint_order(microbatches: int, pp: int, rank: int) -> list[tuple[Literal["forward", "loss", "backward"], int]]:
    """Return a rank's passes and losses in its order, with microbatches, where all ranks form the losses together.

    The schedule of `loss_slots`.
    """
    behind = pp - rank - 1
    ahead = min(2 * behind, microbatches)
    order: list[tuple[Literal["forward", "loss", "backward"], int]] = []
    formed = 0

    def form(before: int) -> None:
        nonlocal formed
        last = max(formed, min(before, microbatches))
        order.extend(("loss", number) for number in range(formed, last))
        formed = last

    for number in range(microbatches + ahead):
        if number < microbatches:
            order.append(("forward", number))
            form(number + 1 - behind)
        if number >= ahead:
            form(number - ahead + behind + 1)
            order.append(("backward", number - ahead))
    return order
