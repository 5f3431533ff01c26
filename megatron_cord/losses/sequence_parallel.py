"""Hidden states that arrive cut over the tensor-parallel ranks by tokens, as Megatron's sequence parallelism leaves them.

They are gathered for the loss, and the gradient, of which each rank has its own columns' part, is summed and cut again in one reduce-scatter.
Shapes: N tokens, H hidden, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N/TP, H] of each rank, in rank order, as [N, H]; the gradient that comes back is a part, and all ranks' parts are summed."""
    return hidden if group is None or dist.get_world_size(group) == 1 else _GatherTokens.apply(hidden, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = hidden.new_empty(dist.get_world_size(group) * hidden.shape[0], hidden.shape[1])
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mine = gradient.new_empty(gradient.shape[0] // dist.get_world_size(ctx.group), gradient.shape[1])
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ctx.group)
        return mine, None
