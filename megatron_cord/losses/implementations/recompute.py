"""Divergence from hidden states with the least memory: logits are formed again for the gradient.

They exist for one block of columns of one chunk. Six GEMMs: two for the logits forward, two for them backward, one each
for the gradients of hidden states and weight. Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.autograd import declare_outputs, upstream_grads
from megatron_cord.losses.implementations.gradients import HiddenGradient, WeightGradient, fresh_gradient_dtype
from megatron_cord.losses.implementations.output_layer import OutputLayers, iter_chunks
from megatron_cord.losses.kernels.backend import UpstreamGrads, upstream_rows
from megatron_cord.losses.shard import Logits, VocabularyShard
from megatron_cord.losses.statistics import GlobalStats, join_stats


class Recompute(torch.autograd.Function):
    """apply(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, shard, chunks) → GlobalStats.

    Hidden states are [N, H], weights [V/TP, H], the teacher's None for entropy and log-probability alone. ``chunks``
    are slices of tokens.
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
        """Form the statistics and keep nothing else."""
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, shard.dtype)
        stats = join_stats([stats for _, _, stats in iter_chunks(shard, layers, target_ids, chunks, keep=False)])
        ctx.shard, ctx.chunks = shard, chunks
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *stats)
        return declare_outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Form the logits again, their gradient, and both products with it."""
        student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, *saved = ctx.saved_tensors
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, ctx.shard.dtype)
        stats, upstream = GlobalStats(*saved), upstream_grads(output_gradients)
        hidden_gradient = HiddenGradient(student_hidden, ctx.shard) if ctx.needs_input_grad[0] else None
        weight_gradient = WeightGradient(student_weight, ctx.shard.dtype) if ctx.needs_input_grad[1] else None
        for rows in ctx.chunks:
            add_gradients(
                ctx.shard,
                layers,
                rows,
                target_ids[rows],
                stats.rows(rows),
                upstream_rows(upstream, rows),
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
    stats: GlobalStats,
    upstream: UpstreamGrads,
    hidden_gradient: HiddenGradient | None,
    weight_gradient: WeightGradient | None,
    kept: Logits | None = None,
) -> None:
    """Add a chunk's part to both gradients, a block of columns at a time; no communication.

    Args:
        shard: this rank's part of the vocabulary.
        layers: both models' output layers.
        rows: the chunk's tokens.
        target_ids: of these, [C].
        stats: of these, each [C].
        upstream: of these, each [C].
        hidden_gradient: is added to, where it is needed.
        weight_gradient: likewise.
        kept: the chunk's logits if they exist already.
    """
    hidden = layers.student_hidden[rows]
    logits = layers.chunk(rows) if kept is None else kept
    dtype = fresh_gradient_dtype(hidden, shard.dtype)
    for span in shard.blocks(logits.block_columns):
        gradient = layers.scratch.take("gradient", len(hidden), span.stop - span.start, dtype, hidden.device)
        shard.block_gradient(span, *logits.block(span), target_ids, stats, upstream, gradient)
        if hidden_gradient is not None:
            hidden_gradient.add(rows, gradient, layers.student_weight[span])
        if weight_gradient is not None:
            weight_gradient.add(span, gradient, hidden)
