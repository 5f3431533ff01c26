"""Divergence from hidden states whose weights are known early: all gradients are formed in the forward pass, and nothing of size [N, V] is kept.

A callback turns a chunk's token scalars into the weights of divergence, entropy and log-probability, between the statistics and the gradient
of the same logits: four GEMMs, for any mixture of the three terms. Kept until the backward pass are [N, H] and [V/TP, H] in fp32.

The caller goes on to form his loss from the outputs as always. In the backward pass the gradients that arrive must be the promised weights
times one number (the loss scale, or a microbatch's share); anything else is an error, since dW can no longer be taken apart by token.
Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cord.errors import CordError
from megatron_cord.losses.autograd import arrived, declare_outputs
from megatron_cord.losses.backends import Weights
from megatron_cord.losses.chunks import totals_in_turn
from megatron_cord.losses.gradients import HiddenGradient, WeightGradient
from megatron_cord.losses.output_layer import OutputLayers
from megatron_cord.losses.recompute import add_gradients, joined
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import Totals

#: How far the arriving weights may be from a multiple of the promised ones, relative to the largest.
PROMISE_TOLERANCE = 1e-4


class LossWeights(NamedTuple):
    """∂L/∂ of a chunk's token scalars, each [C] or None for zero, up to one factor common to all tokens."""

    kl: Tensor | None
    entropy: Tensor | None = None
    student_logprob: Tensor | None = None


#: From a chunk's totals and which tokens they are; the same on all ranks for the same totals.
Weigh = Callable[[Totals, slice], LossWeights]


class Fused(torch.autograd.Function):
    """apply(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, shard, chunks, weigh) → Totals, as ``Recompute``."""

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
        weigh: Weigh,
    ) -> tuple[Tensor, ...]:
        layers = OutputLayers(student_hidden, student_weight, teacher_hidden, teacher_weight, shard.dtype)
        hidden_gradient = HiddenGradient(student_hidden, shard) if ctx.needs_input_grad[0] else None
        # The parameter's main_grad must wait for the backward pass, where the scale is known; a detached view has none.
        weight_gradient = WeightGradient(student_weight.detach(), shard.dtype) if ctx.needs_input_grad[1] else None
        parts, promised = [], []
        for rows, logits, totals in totals_in_turn(shard, layers, target_ids, chunks, keep=True):
            weights = _checked(weigh(totals, rows), totals)
            add_gradients(
                shard, layers, rows, target_ids[rows], totals, weights, hidden_gradient, weight_gradient, logits
            )
            parts.append(totals)
            promised.append(_stacked(weights, totals))
        totals = joined(parts)
        ctx.shard, ctx.chunks, ctx.hidden_gradient = shard, chunks, hidden_gradient
        ctx.save_for_backward(
            student_hidden,
            student_weight,
            None if weight_gradient is None else weight_gradient.total,
            torch.cat(promised, 1),
            *totals,
        )
        return declare_outputs(ctx, totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        student_hidden, student_weight, weight_total, promised, *saved = ctx.saved_tensors
        scale = _kept_promise(promised, _stacked(arrived(output_gradients), Totals(*saved)))
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


def _checked(weights: LossWeights, totals: Totals) -> Weights:
    for name, weight in zip(LossWeights._fields, weights, strict=True):
        if weight is not None and weight.shape != totals.entropy.shape:
            raise CordError(
                f"loss_weights gave {name} weights of shape {list(weight.shape)} for {len(totals.entropy)} tokens"
            )
    kl, entropy, logprob = (None if weight is None else weight.detach().to(totals.entropy.dtype) for weight in weights)
    return kl, entropy, logprob


def _stacked(weights: Weights, totals: Totals) -> Tensor:
    """[3, N], zeros for None."""
    return torch.stack([torch.zeros_like(totals.entropy) if weight is None else weight for weight in weights])


def _kept_promise(promised: Tensor, arriving: Tensor) -> Tensor:
    """The number that takes the promised weights [3, N] to the arriving ones; CordError if there is none."""
    norm = promised.square().sum()
    scale = torch.where(norm > 0, (promised * arriving).sum() / norm, 0.0)
    off = (arriving - scale * promised).abs()
    if bool((off > PROMISE_TOLERANCE * arriving.abs().max()).any() if arriving.numel() else False):
        token = int(off.amax(0).argmax())
        raise CordError(
            f"the loss weighs token {token} by {arriving[:, token].tolist()} (kl, entropy, log-probability), but loss_weights promised "
            f"{(scale * promised[:, token]).tolist()}; promise what the loss does, or use implementation late or recompute"
        )
    return scale
