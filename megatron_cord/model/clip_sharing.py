"""Clips of a microbatch dealt over the context-parallel ranks, each of which encodes its own.

All these ranks have the same clips. What they made of theirs is gathered, in the clips' order; in the backward pass
each rank is given the sum of the gradients that all ranks have for its clips' tokens.
Legend: R context-parallel ranks, C clips, N tokens of all clips, n of this rank's, M of the rank with the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.transfers import to_device


def deal_clips(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the numbers of each rank's clips, ascending: the next costly one to the rank with the least so far.

    Args:
        costs: of the C clips.
        ranks: R.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for clip in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = loads.index(min(loads))
        dealt[rank].append(clip)
        loads[rank] += costs[clip]
    return [sorted(clips) for clips in dealt]


def gather_clips(
    own: Tensor, dealt: Sequence[Sequence[int]], tokens: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Return the tokens of all clips, [N, H], on every rank. Collective, in the backward pass too.

    Args:
        own: [n, H], of this rank's clips, one after the other.
        dealt: as `deal_clips` returns it.
        tokens: of each of the C clips.
        group: the R ranks.
    """
    most = max(sum(tokens[clip] for clip in clips) for clips in dealt)
    starts: dict[int, int] = {}  # of each clip, where the ranks' tokens lie one rank after the other, M rows each
    for rank, clips in enumerate(dealt):
        start = rank * most
        for clip in clips:
            starts[clip] = start
            start += tokens[clip]
    rows = torch.cat([torch.arange(starts[clip], starts[clip] + count) for clip, count in enumerate(tokens)])
    gathered: Tensor = _Gather.apply(own, to_device(rows, own.device), most, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Gather rows of different numbers from all ranks; in the backward pass sum their gradients where they are from."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
        """Return [N, H]."""
        ctx.save_for_backward(rows)
        ctx.count, ctx.most, ctx.group = len(own), most, group
        padded = torch.nn.functional.pad(own, (0, 0, 0, most - len(own)))
        everyones = own.new_empty(group.size() * most, own.shape[1])
        dist.all_gather_into_tensor(everyones, padded, group=group)
        return everyones.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return [n, H]."""
        (rows,) = ctx.saved_tensors
        everyones = gradient.new_zeros(ctx.group.size() * ctx.most, gradient.shape[1]).index_copy(0, rows, gradient)
        own = gradient.new_empty(ctx.most, gradient.shape[1])
        dist.reduce_scatter_tensor(own, everyones, group=ctx.group)
        return own[: ctx.count], None, None, None


def no_tokens(width: int, parameters: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return [0, H] of a rank without a clip, as if the parameters had made it: their gradients are zeros.

    A trained part must have a gradient on every rank, or reductions that overlap with the backward pass wait for it.

    Args:
        width: H.
        parameters: of encoder and adapter, and of LoRA beside them, that are trained.
        like: has the type and device of the others' tokens.
    """
    empty = like.new_zeros(0, width)
    for parameter in parameters:
        empty = empty + parameter.reshape(-1)[:1].sum().to(like.dtype)
    return empty
