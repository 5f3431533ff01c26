"""Divergence from hidden states, least memory: logits exist for one block of columns of one chunk, and are computed again for the gradient.

Six GEMMs: two for the logits forward, two for them backward, one each for the gradients of hidden states and weight.
Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.autograd import arrived, declare_outputs, rows_of
from megatron_cord.losses.backends import Weights, weights_of
from megatron_cord.losses.chunks import totals_in_turn
from megatron_cord.losses.gradients import HiddenGradient, WeightGradient, fresh_gradient_dtype
from megatron_cord.losses.output_layer import OutputLayers
from megatron_cord.losses.shard import Logits, VocabularyShard
from megatron_cord.losses.statistics import Totals


class Recompute(torch.autograd.Function):
    """apply(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, shard, chunks) → Totals as a tuple.

    Hidden states are [N, H], weights [V/TP, H], the teacher's None for entropy and log-probability alone. ``chunks`` are slices of tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        target_ids: Tensor,
        shard: VocabularyShard,
        chunks: list[slice],
    ) -> tuple[Tensor, ...]:
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, shard.dtype)
        totals = joined([totals for _, _, totals in totals_in_turn(shard, layers, target_ids, chunks, keep=False)])
        ctx.shard, ctx.chunks = shard, chunks
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *totals)
        return declare_outputs(ctx, totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *saved = ctx.saved_tensors
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, ctx.shard.dtype)
        totals = Totals(*saved)
        hidden_gradient = HiddenGradient(student_hidden, ctx.shard) if ctx.needs_input_grad[0] else None
        weight_gradient = WeightGradient(student_weight, ctx.shard.dtype) if ctx.needs_input_grad[1] else None
        weights = arrived(output_gradients)
        for rows in ctx.chunks:
            chunk_totals = Totals(*rows_of(totals, rows))
            add_gradients(
                ctx.shard,
                layers,
                rows,
                target_ids[rows],
                chunk_totals,
                weights_of(weights, rows),
                hidden_gradient,
                weight_gradient,
            )
            if hidden_gradient is not None:
                hidden_gradient.reduce(rows)
        return (
            None if hidden_gradient is None else hidden_gradient.result(student_hidden.dtype),
            None if weight_gradient is None else weight_gradient.result(),
            *[None] * 5,
        )


def add_gradients(
    shard: VocabularyShard,
    layers: OutputLayers,
    rows: slice,
    target_ids: Tensor,
    totals: Totals,
    weights: Weights,
    hidden_gradient: HiddenGradient | None,
    weight_gradient: WeightGradient | None,
    kept: Logits | None = None,
) -> None:
    """Adds a chunk's part to both gradients, a block of columns at a time; no communication.

    Args:
        rows: the chunk's tokens; target_ids, totals and weights are of these, each [C].
        kept: the chunk's logits if they exist already.
    """
    hidden = layers.student_hidden[rows]
    logits = layers.chunk(rows) if kept is None else kept
    dtype = fresh_gradient_dtype(hidden, shard.dtype)
    for span in shard.blocks(logits.block_columns):
        gradient = layers.scratch.take("gradient", len(hidden), span.stop - span.start, dtype, hidden.device)
        shard.block_gradient(span, *logits.block(span), target_ids, totals, weights, gradient)
        if hidden_gradient is not None:
            hidden_gradient.add(rows, gradient, layers.student_weight[span])
        if weight_gradient is not None:
            weight_gradient.add(span, gradient, hidden)


def joined(parts: list[Totals]) -> Totals:
    """Chunks' totals as one."""
    return Totals(*(torch.cat(field) for field in zip(*parts, strict=True)))
