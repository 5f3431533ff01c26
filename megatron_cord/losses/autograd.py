"""The gradients of the divergence: autograd functions around a rank's shard of the vocabulary.

A plain all-reduce inside autograd gives wrong gradients when the vocabulary is split. So the forward pass is opaque to autograd, and the
backward pass is the closed formula of ``statistics.gradient_block``.
Simplification: chunk logits are computed again for the gradient, and GEMMs run in float32 (float64 for float64 inputs).

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks. Both functions return the fields of ``Totals``, each [N]; of these
divergence, entropy and student_logprob carry gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import Totals


class DivergenceFromLogits(torch.autograd.Function):
    """apply(student_logits [N, V/TP], teacher_logits [N, V/TP], target_ids [N], shard) → Totals as a tuple."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, target_ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, ...]:
        totals = shard.totals(student_logits, teacher_logits, target_ids)
        ctx.shard = shard
        ctx.save_for_backward(student_logits, teacher_logits, target_ids, *totals)
        return _outputs(ctx, totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, target_ids, *totals = ctx.saved_tensors
        weights = _arriving_weights(output_gradients)
        gradient = ctx.shard.gradient(student_logits, teacher_logits, target_ids, Totals(*totals), weights)
        return gradient.to(student_logits.dtype), None, None, None


class DivergenceFromHidden(torch.autograd.Function):
    """apply(student_hidden [N, H], student_weight [V/TP, H], teacher_hidden, teacher_weight, target_ids [N], shard, chunk).

    Returns Totals as a tuple. ``chunk`` is the number of tokens whose logits exist at a time.
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
        chunk: int,
    ) -> tuple[Tensor, ...]:
        student_layer, teacher_layer = _upcast_layers(student_weight, teacher_weight, shard.dtype)
        parts = [
            shard.totals(
                student_hidden[rows].to(shard.dtype) @ student_layer.T,
                teacher_hidden[rows].to(shard.dtype) @ teacher_layer.T,
                target_ids[rows],
            )
            for rows in _chunks(target_ids.shape[0], chunk)
        ]
        totals = Totals(*(torch.cat(field) for field in zip(*parts, strict=True)))
        ctx.shard, ctx.chunk = shard, chunk
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *totals)
        return _outputs(ctx, totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *saved = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        student_layer, teacher_layer = _upcast_layers(student_weight, teacher_weight, shard.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros(student_hidden.shape, dtype=shard.dtype, device=student_hidden.device) if needs_hidden else None
        weight_gradient = torch.zeros_like(student_layer) if needs_weight else None
        weights = _arriving_weights(output_gradients)
        for rows in _chunks(target_ids.shape[0], ctx.chunk):
            hidden = student_hidden[rows].to(shard.dtype)
            logits_gradient = shard.gradient(
                hidden @ student_layer.T,
                teacher_hidden[rows].to(shard.dtype) @ teacher_layer.T,
                target_ids[rows],
                Totals(*(field[rows] for field in saved)),
                (weights[0][rows], weights[1][rows], weights[2][rows]),
            )
            if hidden_gradient is not None:
                torch.mm(logits_gradient, student_layer, out=hidden_gradient[rows])
            if weight_gradient is not None:
                weight_gradient.addmm_(logits_gradient.T, hidden)
        if hidden_gradient is not None:
            hidden_gradient = shard.sum_over_ranks(hidden_gradient).to(student_hidden.dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(student_weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _outputs(ctx: Any, totals: Totals) -> tuple[Tensor, ...]:
    differentiable = (totals.divergence, totals.entropy, totals.student_logprob)
    ctx.mark_non_differentiable(*(field for field in totals if all(field is not other for other in differentiable)))
    return tuple(totals)


def _arriving_weights(output_gradients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that arrived at divergence, entropy and student_logprob, each [N]; zero where the loss does not use an output."""
    arrived = Totals(*output_gradients)
    return arrived.divergence, arrived.entropy, arrived.student_logprob


def _upcast_layers(student_weight: Tensor, teacher_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both output layers in the type of the logits; one copy if they are the same tensor."""
    student_layer = student_weight.to(dtype)
    same = student_weight.data_ptr() == teacher_weight.data_ptr() and student_weight.stride() == teacher_weight.stride()
    same = same and student_weight.shape == teacher_weight.shape and student_weight.dtype == teacher_weight.dtype
    return student_layer, student_layer if same else teacher_weight.to(dtype)


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` tokens; one empty slice if there are no tokens."""
    return (slice(first, min(first + chunk, num_tokens)) for first in range(0, max(num_tokens, 1), chunk))
