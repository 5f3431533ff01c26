"""What the autograd functions of the divergence share, and the one that takes logits.

A plain all-reduce inside autograd gives wrong gradients when the vocabulary is split. So the forward pass is opaque to
autograd, and the backward pass is the closed formula of ``kernels.eager.block_gradient``. A function returns the fields
of ``GlobalStats``, each [N]; of these divergence, entropy and student_logprob carry gradient.

Shapes: N tokens, V vocabulary, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.shard import StoredLogits, VocabularyShard
from megatron_cord.losses.statistics import GlobalStats
from megatron_cord.parallel.huge_pages import empty_in_huge_pages


class DivergenceFromLogits(torch.autograd.Function):
    """apply(student_logits [N, V/TP], teacher_logits [N, V/TP], target_ids [N], shard) → GlobalStats as a tuple."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, target_ids: Tensor, shard: VocabularyShard
    ) -> tuple[Tensor, ...]:
        """Form the statistics."""
        stats = shard.stats(StoredLogits(student_logits, teacher_logits), target_ids)
        ctx.shard = shard
        ctx.save_for_backward(student_logits, teacher_logits, target_ids, *stats)
        return declare_outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Form the gradient of the student's logits."""
        student_logits, teacher_logits, target_ids, *saved = ctx.saved_tensors
        gradient = empty_in_huge_pages(*student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
        logits = StoredLogits(student_logits, teacher_logits)
        ctx.shard.gradient(logits, target_ids, GlobalStats(*saved), upstream_grads(output_gradients), gradient)
        return gradient, None, None, None


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """Return the outputs of an autograd function that has several: ``function.apply``, typed."""
    outputs: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


def declare_outputs(ctx: Any, stats: GlobalStats) -> tuple[Tensor, ...]:
    """Tell autograd which outputs carry gradient, and to pass None for outputs without one; return the outputs."""
    ctx.set_materialize_grads(False)
    differentiable = (stats.divergence, stats.entropy, stats.student_logprob)
    ctx.mark_non_differentiable(*(field for field in stats if all(field is not other for other in differentiable)))
    return tuple(stats)


def upstream_grads(output_gradients: tuple[Tensor | None, ...]) -> UpstreamGrads:
    """Return the gradients of divergence, entropy and student_logprob, each [N]; None where one is unused."""
    by_name = dict(zip(GlobalStats._fields, output_gradients, strict=True))
    return by_name["divergence"], by_name["entropy"], by_name["student_logprob"]
