"""Divergence from hidden states with the gradient of the logits cached until the backward pass, where it is weighted.

With g the divergence's gradient of the logits at weight 1, formed in the forward pass and kept in the hidden states'
type, and w the upstream gradient of the divergence, known in the backward pass,  dH = diag(w)(g W)  and  dW = gᵀ
(diag(w) h).  So the teacher's and the student's logits are formed once: four GEMMs in all, for one buffer [N, V/TP].

The buffer holds the divergence's gradient alone. Where the loss uses entropy or log-probability too, which no multiple
of g can hold, the student's logits are formed again for those terms (a fifth GEMM, without the teacher) and the sum
goes through the same two products. Shapes: N tokens, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.losses.autograd import declare_outputs, upstream_grads
from megatron_cord.losses.divergences import NO_TEACHER
from megatron_cord.losses.implementations.gradients import (
    HiddenGradient,
    WeightGradient,
    fresh_gradient_dtype,
    gradient_dtype,
)
from megatron_cord.losses.implementations.output_layer import OutputLayers, iter_chunks
from megatron_cord.losses.kernels.backend import upstream_rows
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import GlobalStats, join_stats
from megatron_cord.parallel.huge_pages import empty_in_huge_pages


class CachedGrad(torch.autograd.Function):
    """Arguments and result as of ``Recompute``."""

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
    ) -> tuple[Tensor, ...]:
        """Form the statistics, and of each block of logits the gradient at weight 1."""
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, shard.dtype)
        spans, dtype = shard.blocks(layers.block_columns), gradient_dtype(student_hidden, shard.dtype)
        # By blocks of columns, each with all tokens: one product a block makes the weight's gradient.
        num_tokens = len(target_ids)
        memory = empty_in_huge_pages(num_tokens * shard.columns, dtype=dtype, device=student_hidden.device)
        pieces = torch.split(memory, [num_tokens * (span.stop - span.start) for span in spans])
        unweighted = [piece.view(num_tokens, span.stop - span.start) for piece, span in zip(pieces, spans, strict=True)]
        parts = []
        for rows, logits, stats in iter_chunks(shard, layers, target_ids, chunks, keep=True):
            unit = stats.divergence.isfinite().to(shard.dtype)  # an infinite divergence has no gradient to keep
            for span, kept in zip(spans, unweighted, strict=True):
                shard.block_gradient(span, *logits.block(span), target_ids[rows], stats, (unit, None, None), kept[rows])
            parts.append(stats)
        stats = join_stats(parts)
        ctx.shard, ctx.chunks = shard, chunks
        ctx.save_for_backward(student_hidden, student_weight, target_ids, *stats, *unweighted)
        return declare_outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Weigh the cached gradient, add the other terms' where there are any, and form both products."""
        student_hidden, student_weight, target_ids, *saved = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        fields = len(GlobalStats._fields)
        stats, unweighted = GlobalStats(*saved[:fields]), saved[fields:]
        upstream = upstream_grads(output_gradients)
        hidden_gradient = HiddenGradient(student_hidden, shard) if ctx.needs_input_grad[0] else None
        by_divergence = torch.zeros_like(stats.divergence) if upstream[0] is None else upstream[0]
        # An infinite divergence that the loss uses has the gradient NaN, not 0.
        by_divergence = torch.where(stats.divergence.isfinite() | (by_divergence == 0), by_divergence, torch.nan)
        alone = upstream[1] is None and upstream[2] is None
        written = shard.columns if alone else None
        weight_gradient = (
            WeightGradient(student_weight, shard.dtype, written=written) if ctx.needs_input_grad[1] else None
        )
        layers = OutputLayers(student_hidden, student_weight, None, None, shard.dtype)
        spans = shard.blocks(layers.block_columns)
        if alone:
            _multiply(
                shard,
                ctx.chunks,
                spans,
                student_hidden,
                student_weight,
                unweighted,
                by_divergence,
                hidden_gradient,
                weight_gradient,
            )
        else:
            others = replace(shard, divergence=NO_TEACHER)
            dtype = fresh_gradient_dtype(student_hidden, shard.dtype)
            for rows in ctx.chunks:
                logits, hidden = layers.chunk(rows), student_hidden[rows]
                for span, kept in zip(spans, unweighted, strict=True):
                    terms = layers.scratch.take(
                        "gradient", len(hidden), span.stop - span.start, shard.dtype, hidden.device
                    )
                    given = upstream_rows((None, *upstream[1:]), rows)
                    others.block_gradient(span, *logits.block(span), target_ids[rows], stats.rows(rows), given, terms)
                    gradient = terms.addcmul_(kept[rows].to(shard.dtype), by_divergence[rows, None]).to(dtype)
                    if hidden_gradient is not None:
                        hidden_gradient.add(rows, gradient, student_weight[span])
                    if weight_gradient is not None:
                        weight_gradient.add(span, gradient, hidden)
                if hidden_gradient is not None:
                    hidden_gradient.reduce(rows)
        return (
            None if hidden_gradient is None else hidden_gradient.result(student_hidden.dtype),
            None if weight_gradient is None else weight_gradient.result(),
            *[None] * 5,
        )


def _multiply(
    shard: VocabularyShard,
    chunks: list[slice],
    spans: list[slice],
    student_hidden: Tensor,
    student_weight: Tensor,
    unweighted: list[Tensor],
    by_divergence: Tensor,
    hidden_gradient: HiddenGradient | None,
    weight_gradient: WeightGradient | None,
) -> None:
    """Form dH = diag(w)(g W), whose sum over ranks goes on while dW = gᵀ (diag(w) h) is formed."""
    if hidden_gradient is not None:
        # By chunks only where the sum of one goes on while the next is formed: one large product takes less time.
        for rows in chunks if shard.num_ranks > 1 else [slice(0, len(student_hidden))]:
            for span, kept in zip(spans, unweighted, strict=True):
                hidden_gradient.add(rows, kept[rows], student_weight[span])
            hidden_gradient.total[rows] *= by_divergence[rows, None]
            hidden_gradient.reduce(rows)
    if weight_gradient is not None:
        weighted = (student_hidden * by_divergence[:, None]).to(fresh_gradient_dtype(student_hidden, shard.dtype))
        for span, kept in zip(spans, unweighted, strict=True):
            weight_gradient.write(span, kept, weighted)
