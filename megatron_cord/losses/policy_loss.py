"""L_seq as configured: the paper's ``cord.sequence_loss``, or a surrogate of ``surrogates`` in its place.

Two corrections stay apart, as is usual: the surrogate's ratio r = p_θ/p_old bounds what several updates on a batch do,
the truncated weight ρ = min(p_old/p_engine, cap) corrects for an engine that is not the trainer's old policy. The
paper's term has no ratio; its weight is ρ = min(p_θ/p_engine, cap), for both.

Shapes: N packed response tokens of this rank, B responses; ``cu_seqlens`` [B+1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.cord import sequence_loss
from megatron_cord.losses.policy_gradient import PolicyGradientConfig, truncated_ratio
from megatron_cord.losses.responses import response_means, response_of_token
from megatron_cord.losses.surrogates import cispo_terms, clipped_terms, sequence_ratio, token_ratio


@dataclass(frozen=True, eq=False)
class PolicyTokens:
    """Whole responses of L_seq, or this context-parallel rank's tokens of them."""

    student_logprob: Tensor  #: [N], differentiable
    old_logprob: Tensor | None  #: [N], of the trainer before the step's first update; None: these are it
    engine_logprob: Tensor  #: [N]; NaN where the engine's weights are broken
    cu_seqlens: Tensor  #: integers [B+1]
    lengths: Tensor  #: [B], tokens of the whole responses
    advantages: Tensor  #: [B], A_i


@dataclass(frozen=True, eq=False)
class RatioStats:
    """What became of the ratios r of the tokens with an advantage; numbers, summed over calls by ``merged``."""

    sums: Tensor  #: float64 [4]: tokens, their ratios, tokens clipped below, tokens clipped above
    largest: Tensor  #: float64, a scalar; 0 without tokens

    @classmethod
    def none(cls, device: torch.device) -> RatioStats:
        """Return those of no tokens."""
        zeros = torch.zeros(5, dtype=torch.float64, device=device)
        return cls(zeros[:4], zeros[4])

    def merged(self, other: RatioStats) -> RatioStats:
        """Return those of both."""
        return RatioStats(self.sums + other.sums, torch.maximum(self.largest, other.largest))


def policy_loss(
    config: PolicyGradientConfig, tokens: PolicyTokens, count: int, *, cp_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, RatioStats | None]:
    """Return L_seq of these tokens, a scalar without ``config.weight``, and the ratios' statistics of a surrogate.

    Args:
        config: which surrogate, ratio and mean.
        tokens: of whole responses, or of this rank's part of them.
        count: what the terms are divided by, over all ranks and microbatches of an update: responses, tokens, or
            responses times the longest possible.
        cp_group: the ranks that share the responses. Collective over them where the ratio is the sequence's.
    """
    broken = tokens.engine_logprob.isnan()
    if config.surrogate == "reinforce":
        loss, ratios = _reinforce(config, tokens, count), None
    else:
        loss, ratios = _surrogate(config, tokens, count, cp_group)
    # NaN: nothing to learn from. A branch would wait for the device.
    return loss * torch.where(broken.any(), torch.nan, 1.0), ratios


def importance_weights(logprob: Tensor, tokens: PolicyTokens, cap: float) -> Tensor:
    """Return ρ_t = min(p / p_engine, cap), [N]; where the engine has no log-probability, a number to be replaced."""
    return truncated_ratio(logprob - tokens.engine_logprob.nan_to_num().to(logprob.dtype), cap)


def _reinforce(config: PolicyGradientConfig, tokens: PolicyTokens, count: int) -> Tensor:
    weights = importance_weights(tokens.student_logprob, tokens, config.importance_cap)
    if config.normalization == "response_mean":
        weights = weights / _length_of_token(tokens)
    return sequence_loss(
        tokens.student_logprob, tokens.cu_seqlens, tokens.advantages, count, importance_weights=weights
    )


def _surrogate(
    config: PolicyGradientConfig, tokens: PolicyTokens, count: int, cp_group: dist.ProcessGroup | None
) -> tuple[Tensor, RatioStats]:
    student, cu_seqlens = tokens.student_logprob, tokens.cu_seqlens
    old = student.detach() if tokens.old_logprob is None else tokens.old_logprob.to(student.dtype)
    advantages = tokens.advantages.to(student.dtype)[response_of_token(student, cu_seqlens)]
    weights = importance_weights(old, tokens, config.importance_cap)
    if config.ratio == "sequence":
        ratio = sequence_ratio(student, old, cu_seqlens, tokens.lengths, cp_group=cp_group)
    else:
        ratio = token_ratio(student, old)
    if config.surrogate == "cispo":
        terms = cispo_terms(student, ratio, advantages, config.clip_high)
    else:
        terms = clipped_terms(ratio, advantages, config.clip_low, config.clip_high)
        if config.ratio == "sequence":  # one term a response has one weight: so its gradient is that of its value
            weights = response_means(weights, cu_seqlens, tokens.lengths, cp_group=cp_group)
    terms = weights * terms
    if config.normalization == "response_mean":
        terms = terms / _length_of_token(tokens)
    return terms.sum() / count, _ratio_stats(config, ratio.detach(), advantages)


def _length_of_token(tokens: PolicyTokens) -> Tensor:
    """Return the length of each token's whole response, [N]."""
    response = response_of_token(tokens.student_logprob, tokens.cu_seqlens)
    return tokens.lengths.to(response.device)[response]


def _ratio_stats(config: PolicyGradientConfig, ratio: Tensor, advantages: Tensor) -> RatioStats:
    """Return statistics of the tokens with an advantage; clipped is what has no gradient, of CISPO what is bounded."""
    counted = advantages != 0
    high = ratio > 1.0 + config.clip_high
    low = ratio < 1.0 - config.clip_low
    if config.surrogate == "cispo":
        low, high = torch.zeros_like(low), high & counted
    else:
        low, high = low & (advantages < 0), high & (advantages > 0)
    ratio = torch.where(counted, ratio, 0.0).double()  # selecting the counted ones would wait for their number
    sums = torch.stack([counted.double().sum(), ratio.sum(), low.double().sum(), high.double().sum()])
    return RatioStats(sums, ratio.max() if len(ratio) else ratio.new_zeros(()))
