"""The output layer's two gradients as they are summed: of the hidden states over ranks, of the weight in fp32.

Gradients of logits may be rounded, for every product with them averages the rounding out; always to bfloat16, as in
float16 they would underflow.

Under sequence parallelism hidden states are split over the tensor-parallel ranks by tokens, are gathered for the
loss, and each rank gets the gradient of its own tokens.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.autograd import apply_function
from megatron_cord.losses.kernels.matmul import LOW_PRECISION, add_product, operand_dtype, write_product
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.parallel.huge_pages import empty_in_huge_pages


class HiddenGradient:
    """∂L/∂student_hidden, [N, H], summed in fp32 over columns and, while the next chunk is computed, over ranks.

    Every rank gets the whole sum; under sequence parallelism each gets that of its own tokens, and the other rows of
    ``result`` are undefined.
    """

    def __init__(self, hidden: Tensor, shard: VocabularyShard) -> None:
        self.total = torch.zeros(hidden.shape, dtype=shard.dtype, device=hidden.device)
        self._shard = shard
        self._pending: list[dist.Work | None] = []

    def add(self, rows: slice, logits_gradient: Tensor, weight: Tensor) -> None:
        """Add logits_gradient [C, columns] · weight [columns, H]."""
        add_product(self.total[rows], logits_gradient, weight)

    def reduce(self, rows: slice) -> None:
        """Start to sum finished rows over the ranks; NCCL does so on a stream of its own."""
        shard = self._shard
        if shard.num_ranks == 1 or self.total.numel() == 0:
            return
        if not shard.sequence_parallel:
            self._pending.append(dist.all_reduce(self.total[rows], group=shard.group, async_op=True))
            return
        part = len(self.total) // shard.num_ranks
        for owner in range(rows.start // part, (rows.stop - 1) // part + 1):
            mine = self.total[max(rows.start, owner * part) : min(rows.stop, (owner + 1) * part)]
            self._pending.append(dist.reduce(mine, group_dst=owner, group=shard.group, async_op=True))

    def scaled(self, scale: Tensor) -> HiddenGradient:
        """Return this, not yet summed over ranks, times a scalar."""
        other = HiddenGradient(self.total, self._shard)
        torch.mul(self.total, scale, out=other.total)
        return other

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient, when all that was started is done."""
        for work in self._pending:
            if work is not None:
                work.wait()
        return self.total.to(dtype)


class WeightGradient:
    """∂L/∂student_weight of this rank's shard, [V/TP, H], summed in fp32.

    Megatron's DistributedDataParallel gives a parameter an fp32 ``main_grad``. Where there is one the sum goes straight
    into it, as Megatron's own fused layers do: ``grad_added_to_main_grad`` is set, and autograd gets a sparse tensor
    without entries, to which a tied embedding's gradient may be added. Where all tokens of a span are known at once,
    ``written`` is the number of rows that ``write`` will fill, each once; then the sum is inside the product, and no
    memory but the result's is needed.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, written: int | None = None) -> None:
        self._weight = weight
        main_grad = getattr(weight, "main_grad", None)
        self._in_place = (
            main_grad is not None and main_grad.dtype == dtype and hasattr(weight, "grad_added_to_main_grad")
        )
        if self._in_place:
            self.total: Tensor = main_grad  # type: ignore[assignment]
        elif written is None:
            self.total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        else:
            self.total = empty_in_huge_pages(*weight.shape, dtype=weight.dtype, device=weight.device)
            self.total[written:] = 0.0  # padding

    def add(self, span: slice, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Add logits_gradient [C, columns]ᵀ · hidden [C, H] to the rows of the span."""
        add_product(self.total[span], logits_gradient.T, hidden)

    def write(self, span: slice, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Write logits_gradient [N, columns]ᵀ · hidden [N, H] to the span's rows; add it to a ``main_grad``."""
        if self._in_place:
            self.add(span, logits_gradient, hidden)
        else:
            write_product(self.total[span], logits_gradient.T, hidden)

    def add_scaled(self, total: Tensor, scale: Tensor) -> None:
        """Add a finished sum [V/TP, H] times a scalar."""
        self.total.addcmul_(total, scale)

    def result(self) -> Tensor:
        """Return what autograd gets."""
        if not self._in_place:
            return self.total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Autograd would clone expanded zeros to their full size, [V/TP, H], and DDP's hooks want a gradient, not None.
        weight = self._weight
        return torch.sparse_coo_tensor(  # type: ignore[call-arg]  # the stub lacks the form without elements
            size=weight.shape, dtype=weight.dtype, device=weight.device, check_invariants=False
        )


def gradient_dtype(hidden: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """Return the type of kept gradients of logits: bfloat16 for hidden states of 16 bits, else that of the logits."""
    return torch.bfloat16 if hidden.dtype in LOW_PRECISION and logits_dtype == torch.float32 else logits_dtype


def fresh_gradient_dtype(hidden: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """Return the type of gradients of logits that are multiplied at once and not kept: what the products need."""
    return operand_dtype(gradient_dtype(hidden, logits_dtype), hidden.device)


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [N/TP, H] of each rank, in rank order, as [N, H]; each rank gets the gradient of its own rows."""
    if group is None or dist.get_world_size(group) == 1:
        return hidden
    (gathered,) = apply_function(_GatherTokens, hidden, group)
    return gathered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor]:
        ctx.group = group
        gathered = hidden.new_empty(dist.get_world_size(group) * hidden.shape[0], hidden.shape[1])
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
        return (gathered,)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # HiddenGradient has summed each token's gradient at its owner.
        part = gradient.shape[0] // dist.get_world_size(ctx.group)
        return gradient.narrow(0, dist.get_rank(ctx.group) * part, part), None
