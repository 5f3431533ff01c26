"""Hidden states that arrive cut over the tensor-parallel ranks by tokens, as Megatron's sequence parallelism leaves them.

They are gathered for the loss. Its gradient, of which each rank has its own columns' part, has been summed at each token's owner
(``HiddenGradient``, chunk by chunk) when it comes back here, and each rank takes its own tokens.
Shapes: N tokens, H hidden, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N/TP, H] of each rank, in rank order, as [N, H]; of the gradient that comes back this rank's rows count."""
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
        part = gradient.shape[0] // dist.get_world_size(ctx.group)
        return gradient.narrow(0, dist.get_rank(ctx.group) * part, part), None
