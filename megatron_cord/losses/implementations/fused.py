"""The loss from hidden states with all gradients formed in the forward pass, and nothing of size [N, V] kept.

A function turns the statistics of a chunk of tokens into the chunk's loss, between the statistics and the gradient of
the same logits. Its own gradient weighs the chunk's divergence, entropy and log-probability: four GEMMs, for any
mixture of the three. The backward pass multiplies by one number. Kept until then are [N, H] and [V/TP, H] in fp32.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.implementations.gradients import HiddenGradient, WeightGradient
from megatron_cord.losses.implementations.output_layer import OutputLayers, iter_chunks
from megatron_cord.losses.implementations.recompute import add_gradients
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import GlobalStats, TokenStats, join_stats

#: From a chunk's statistics, each [C], and the tokens that they are of, to the chunk's loss: a scalar, differentiable
#: with respect to divergence, entropy and student_logprob, and equal on all ranks that share the vocabulary.
ChunkLoss = Callable[[TokenStats, slice], Tensor]


class Fused(torch.autograd.Function):
    """apply(…, chunk_loss) → (loss, *GlobalStats), with the arguments of ``Recompute`` first.

    Only the loss carries gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        target_ids: Tensor,
        shard: VocabularyShard,
        chunks: list[slice],
        chunk_loss: ChunkLoss,
    ) -> tuple[Tensor, ...]:
        """Form the loss and its gradients, chunk by chunk."""
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, shard.dtype)
        hidden_gradient = HiddenGradient(student_hidden, shard) if ctx.needs_input_grad[0] else None
        # The parameter's main_grad must wait for the backward pass, where the scale is known; a detached view has none.
        weight_gradient = WeightGradient(student_weight.detach(), shard.dtype) if ctx.needs_input_grad[1] else None
        losses, parts = [], []
        for rows, logits, stats in iter_chunks(shard, layers, target_ids, chunks, keep=True):
            loss, upstream = _loss_and_gradient(chunk_loss, stats, rows)
            add_gradients(
                shard, layers, rows, target_ids[rows], stats, upstream, hidden_gradient, weight_gradient, logits
            )
            losses.append(loss)
            parts.append(stats)
        ctx.shard, ctx.chunks, ctx.hidden_gradient = shard, chunks, hidden_gradient
        weight_total = None if weight_gradient is None else weight_gradient.total
        ctx.save_for_backward(student_hidden, student_weight, weight_total)
        stats = join_stats(parts)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Multiply the gradients by the loss's own, and sum that of the hidden states over the ranks."""
        if scale is None:
            return (None,) * 8
        student_hidden, student_weight, weight_total = ctx.saved_tensors
        hidden_result = weight_result = None
        if ctx.hidden_gradient is not None:
            hidden_gradient = ctx.hidden_gradient.scaled(scale)
            for rows in ctx.chunks:
                hidden_gradient.reduce(rows)
        if weight_total is not None:
            weight_gradient = WeightGradient(student_weight, ctx.shard.dtype)
            weight_gradient.add_scaled(weight_total, scale)
            weight_result = weight_gradient.result()
        if ctx.hidden_gradient is not None:
            hidden_result = hidden_gradient.result(student_hidden.dtype)
        return hidden_result, weight_result, *[None] * 6


def _loss_and_gradient(chunk_loss: ChunkLoss, stats: GlobalStats, rows: slice) -> tuple[Tensor, UpstreamGrads]:
    """Return a chunk's loss, detached, and its gradients by divergence, entropy and log-probability, [C] or None."""
    leaves = [field.detach().requires_grad_() for field in (stats.divergence, stats.entropy, stats.student_logprob)]
    kl, entropy, student_logprob = leaves
    with torch.enable_grad():  # autograd is off inside a function's forward pass
        loss = chunk_loss(TokenStats(kl, entropy, student_logprob, stats.teacher_logprob), rows)
        if not loss.requires_grad:
            return loss, (None, None, None)
        by_divergence, by_entropy, by_logprob = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), (by_divergence, by_entropy, by_logprob)
