"""CORD's objective for one microbatch: L = L_tok + L_seq (arXiv 2601.16547), and the switches that turn it into its rivals.

L_tok = Σ_t w_t D_t over each response, mean over responses. L_seq = −(1/N) Σ_i A_i log p(y_i) over a prompt's N rollouts, mean over prompts.
Dividing both by tokens instead of responses keeps their ratio where lengths are alike, and makes the learning rate independent of the length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses import (
    DivergenceConfig,
    LossWeights,
    PolicyGradientConfig,
    TokenStats,
    TokenWeightsConfig,
    divergence_from_hidden,
    policy_gradient_loss,
    token_logprobs_from_hidden,
    token_weights,
    truncated_importance_weights,
)
from megatron_cord.trainer.step.batches import Microbatch


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimized. The defaults are the paper's."""

    #: whose responses L_tok scores: the student's (on-policy) or the teacher's (off-policy)
    responses: Literal["student", "teacher"] = "student"
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    token_weights: TokenWeightsConfig = field(default_factory=TokenWeightsConfig)
    policy_gradient: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    #: both losses are divided by the number of responses (the paper) or of their tokens
    normalization: Literal["response", "token"] = "response"
    #: how the divergence's gradient is formed; docs/loss.md compares them
    implementation: Literal["auto", "late", "fused", "recompute"] = "auto"
    #: what computes the divergence; auto compiles on a CPU where calls are large
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"

    def __post_init__(self) -> None:
        kind, policy = self.divergence.kind, self.policy_gradient.enabled
        if kind == "none" and not policy:
            raise CordError(
                "objective.divergence.kind is none and objective.policy_gradient.enabled is false: nothing is left to "
                "train on"
            )
        if self.responses == "teacher" and policy:
            raise CordError(
                "objective.policy_gradient.enabled needs objective.responses=student: the policy gradient is for the "
                "student's own rollouts"
            )
        if kind == "sampled" and self.responses == "teacher":
            raise CordError(
                "objective.divergence.kind=sampled needs objective.responses=student: it is an estimate from tokens "
                "that the student sampled"
            )

    @property
    def distils(self) -> bool:
        """Whether a teacher's distributions are compared."""
        return self.divergence.needs_teacher


@dataclass(frozen=True)
class GlobalCounts:
    """What the sums are divided by, over all data-parallel ranks and microbatches of the step."""

    scored: int  #: responses of L_tok, or their tokens, as the objective's normalization says
    policy: int  #: the same of L_seq, those of zero-variance groups included


@dataclass(frozen=True, eq=False)
class MicrobatchLoss:
    """Losses of one microbatch, already divided by the global counts, and what the record keeps.

    Attributes:
        token: L_tok's part, a scalar.
        sequence: L_seq's part, a scalar.
        stats: of the n response tokens of this rank.
        weights: w_t, [n]; None where the microbatch is not scored token by token.
    """

    token: Tensor
    sequence: Tensor
    stats: TokenStats
    weights: Tensor | None


def microbatch_loss(
    config: ObjectiveConfig,
    counts: GlobalCounts,
    batch: Microbatch,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
) -> MicrobatchLoss:
    """Scores the responses of one microbatch, or this context-parallel rank's n tokens of them: the ranks' losses add up.

    Args:
        config: the objective.
        counts: the step's global denominators.
        batch: the microbatch.
        student_hidden: [n, H], at the rows that predict the response.
        student_weight: [V/TP, H].
        teacher_hidden: [n, H]; None if nothing is distilled here.
        teacher_weight: [V/TP, H]; None likewise.
        vocab_size: the true V.
        tp_group: the vocabulary's shards.
        cp_group: the ranks that share the responses. Token weights then need all of them, so no chunk's can be promised (implementation fused).
    """
    # A distribution that is not finite makes a loss that is not: the step is skipped, as one for gradients is.
    if teacher_hidden is None or teacher_weight is None or not config.distils:
        stats = token_logprobs_from_hidden(
            student_hidden,
            student_weight,
            batch.target_ids,
            vocab_size=vocab_size,
            tp_group=tp_group,
            backend=config.backend,
            check_finite=False,
        )
    else:
        alone = cp_group is None or dist.get_world_size(cp_group) == 1
        if config.implementation == "fused" and not alone:
            raise CordError(
                "objective.implementation=fused cannot weigh responses that lie on several context-parallel ranks; choose auto or late"
            )
        stats = divergence_from_hidden(
            student_hidden,
            student_weight,
            teacher_hidden.to(student_hidden.device, non_blocking=True),
            teacher_weight,
            batch.target_ids,
            kind="reverse_kl" if config.divergence.kind == "sampled" else config.divergence.kind,
            beta=config.divergence.beta,
            k=config.divergence.k,
            vocab_size=vocab_size,
            tp_group=tp_group,
            implementation=config.implementation,
            loss_weights=(lambda some, rows: _promised(config, counts, some, _part(config, batch, rows)))
            if alone
            else None,
            cu_seqlens=batch.cu_seqlens if alone else None,
            backend=config.backend,
            check_finite=False,
        )
    token, sequence, weights = _terms(
        config, counts, stats, _part(config, batch, slice(0, len(batch.target_ids))), cp_group
    )
    return MicrobatchLoss(token, sequence, stats, weights)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some whole responses of a microbatch: n tokens, b responses."""

    cu_seqlens: Tensor  #: int64 [b + 1]
    positions: Tensor  #: int64 [n], in their responses
    engine_logprobs: Tensor  #: [n]
    advantages: Tensor  #: [b]
    scored: bool  #: whether they are part of L_tok
    rewarded: bool  #: whether any response of the microbatch, be it in this part or not, is part of L_seq


def _part(config: ObjectiveConfig, batch: Microbatch, rows: slice) -> _Part:
    """The responses that these tokens are; a chunk holds whole ones."""
    first = int(torch.searchsorted(batch.cu_seqlens, rows.start))
    last = int(torch.searchsorted(batch.cu_seqlens, rows.stop, right=True)) - 1
    return _Part(
        batch.cu_seqlens[first : last + 1] - rows.start,
        batch.positions[rows],
        batch.engine_logprobs[rows],
        batch.advantages[first:last],
        batch.scored,
        config.policy_gradient.enabled and bool(batch.advantages.any()),
    )


def _terms(
    config: ObjectiveConfig, counts: GlobalCounts, stats: TokenStats, part: _Part, cp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L_tok's part, L_seq's part, token weights [n]) of these responses, whose stats are [n]."""
    # A term that is absent must not ask the loss for a gradient of zero; but some gradient there must be.
    zero = stats.kl.new_zeros(()) if part.scored or part.rewarded else stats.student_logprob.sum() * 0.0
    token, sequence, weights = zero, zero, None
    if part.scored:
        divergence = stats.kl if config.distils else -stats.student_logprob
        weights = token_weights(
            divergence,
            part.cu_seqlens,
            config.token_weights,
            entropy=stats.entropy,
            positions=part.positions,
            cp_group=cp_group,
        )
        if config.divergence.kind == "sampled":
            divergence = _sampled_reverse_kl(stats, part, config.policy_gradient.importance_cap)
        token = (weights * divergence).sum() / counts.scored
    if part.rewarded:
        engine = part.engine_logprobs
        ratio = truncated_importance_weights(
            stats.student_logprob, engine.nan_to_num(), part.cu_seqlens, cap=config.policy_gradient.importance_cap
        )
        terms = policy_gradient_loss(stats.student_logprob, part.cu_seqlens, part.advantages, importance_weights=ratio)
        sequence = config.policy_gradient.weight * terms.sum() / counts.policy
        if engine.isnan().any():  # the weights that it sampled with are broken: nothing to learn from
            sequence = sequence * torch.nan
    return token, sequence, weights


def _sampled_reverse_kl(stats: TokenStats, part: _Part, cap: float) -> Tensor:
    """(log p(y_t) − log q(y_t)) log p(y_t), [n], whose factor in brackets is a number: minus the advantage that each token has of its own.

    Its gradient is an unbiased estimate of D_t's, over tokens sampled at temperature 1, without a sum over the vocabulary; its value says nothing.
    Source: on-policy distillation (Thinking Machines, 2025), where a token answers for its own log-ratio only, not for later ones.
    """
    engine = part.engine_logprobs
    ratio = truncated_importance_weights(stats.student_logprob, engine.nan_to_num(), part.cu_seqlens, cap=cap)
    ratio = ratio.masked_fill(
        engine.isnan(), torch.nan
    )  # the weights that it sampled with are broken: nothing to learn from
    cost = (stats.student_logprob - stats.teacher_logprob).detach()
    return ratio * cost * stats.student_logprob


def _promised(config: ObjectiveConfig, counts: GlobalCounts, stats: TokenStats, part: _Part) -> LossWeights:
    """The gradient of ``_terms`` with respect to the stats: what the loss will ask of these tokens."""
    leaves = kl, entropy, logprob = tuple(
        field.detach().requires_grad_() for field in (stats.kl, stats.entropy, stats.student_logprob)
    )
    with torch.enable_grad():  # the callback runs inside a forward pass of autograd's own
        token, sequence, _ = _terms(config, counts, TokenStats(kl, entropy, logprob, stats.teacher_logprob), part, None)
        return LossWeights(*torch.autograd.grad(token + sequence, leaves, allow_unused=True))
