"""The loss of one microbatch, composed as configured from ``losses.cord`` and its variants.

Shapes: n response tokens of a microbatch on this context-parallel rank, b responses; H hidden, V vocabulary, TP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses import (
    TokenStats,
    cord,
    distillation_loss,
    one_sided_gap,
    sampled_reverse_kl,
    token_weights,
)
from megatron_cord.losses.policy_loss import PolicyTokens, RatioStats, importance_weights, policy_loss
from megatron_cord.losses.responses import response_of_token
from megatron_cord.trainer.step.batching.batches import Microbatch
from megatron_cord.trainer.step.objective import GlobalCounts, ObjectiveConfig


@dataclass(frozen=True, eq=False)
class MicrobatchLoss:
    """The loss of one microbatch, already divided by the global counts, and what is recorded of it.

    Attributes:
        total: L's part, a scalar: the only field with gradient.
        token: L_tok's part, a scalar.
        sequence: L_seq's part, a scalar.
        stats: of the n response tokens of this rank.
        weights: w_t, [n]; None where the microbatch is not scored token by token.
        ratios: statistics of L_seq's ratios; None without any.
        stream: of the microbatch.
    """

    total: Tensor
    token: Tensor
    sequence: Tensor
    stats: TokenStats
    weights: Tensor | None
    ratios: RatioStats | None = None
    stream: str = ""


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
    weight: float = 1.0,
    gate: Tensor | None = None,
) -> MicrobatchLoss:
    """Return the loss of one microbatch, or of this context-parallel rank's n tokens of it: the ranks' losses add up.

    Args:
        config: the objective, with the stream's own divergence and token weights.
        counts: the step's global denominators, of the stream.
        batch: the microbatch.
        student_hidden: [n, H], at the rows that predict the response.
        student_weight: [V/TP, H].
        teacher_hidden: [n, H]; None if nothing is distilled here.
        teacher_weight: [V/TP, H]; None likewise.
        vocab_size: the true V.
        tp_group: the vocabulary's shards.
        cp_group: the ranks that share the responses. Token weights then need the tokens of all of them, so the loss of
            a chunk cannot be computed alone (implementation fused).
        weight: λ of the stream.
        gate: [n], by which w_t is multiplied; None: all tokens count.
    """
    alone = cp_group is None or dist.get_world_size(cp_group) == 1
    if config.implementation == "fused" and not alone:
        raise CordError(
            "objective.implementation=fused cannot weigh responses that lie on several context-parallel ranks; choose "
            "auto or cached_grad"
        )
    if not config.distils:
        teacher_hidden = teacher_weight = None
    terms: list[_Terms] = []  # of each call below, in the order of the tokens

    def chunk_loss(stats: TokenStats, rows: slice) -> Tensor:
        terms.append(_terms(config, counts, stats, _responses(config, batch, rows, gate), cp_group, weight))
        return cord.total_loss(terms[-1].token, terms[-1].sequence)

    total, stats = distillation_loss(
        chunk_loss,
        student_hidden,
        student_weight,
        None if teacher_hidden is None else teacher_hidden.to(student_hidden.device, non_blocking=True),
        teacher_weight,
        batch.target_ids,
        kind=config.divergence.summed,
        beta=config.divergence.beta,
        k=config.divergence.k,
        vocab_size=vocab_size,
        tp_group=tp_group,
        implementation=config.implementation,
        cu_seqlens=batch.cu_seqlens if alone else None,
        splittable=alone,
        backend=config.backend,
        # A distribution that is not finite makes a loss that is not, and the step is skipped; the targets were checked
        # before they went to the device.
        check_finite=False,
        check_targets=False,
    )
    weights = [term.weights for term in terms if term.weights is not None]
    ratios = [term.ratios for term in terms if term.ratios is not None]
    return MicrobatchLoss(
        total,
        _sum([term.token for term in terms]),
        _sum([term.sequence for term in terms]),
        stats,
        torch.cat(weights) if weights else None,
        reduce(RatioStats.merged, ratios) if ratios else None,
        batch.stream,
    )


@dataclass(frozen=True, eq=False)
class _Responses:
    """Whole responses of a microbatch: n tokens, b responses."""

    cu_seqlens: Tensor  #: int64 [b + 1], in host memory
    positions: Tensor  #: int64 [n], in their responses
    lengths: Tensor  #: int64 [b], of the whole responses
    old_logprobs: Tensor | None  #: [n], before the step's first update; None: there is one update
    engine_logprobs: Tensor  #: [n]
    advantages: Tensor  #: [b]
    gate: Tensor | None  #: [n], by which w_t is multiplied; None: all tokens count
    scored: bool  #: whether they are part of L_tok
    rewarded: bool  #: whether any response of the microbatch, be it among these or not, is part of L_seq


def _responses(config: ObjectiveConfig, batch: Microbatch, rows: slice, gate: Tensor | None) -> _Responses:
    """Return the responses that these tokens are; a chunk holds whole ones."""
    first = int(torch.searchsorted(batch.cu_seqlens, rows.start))
    last = int(torch.searchsorted(batch.cu_seqlens, rows.stop, right=True)) - 1
    return _Responses(
        batch.cu_seqlens[first : last + 1] - rows.start,
        batch.positions[rows],
        batch.lengths[first:last],
        None if batch.old_logprobs is None else batch.old_logprobs[rows],
        batch.engine_logprobs[rows],
        batch.advantages[first:last],
        None if gate is None else gate[rows],
        batch.scored,
        config.policy_gradient.enabled and batch.rewarded,
    )


@dataclass(frozen=True, eq=False)
class _Terms:
    """The two losses of some responses, scalars; the weights w_t [n], None without L_tok; what the ratios were."""

    token: Tensor
    sequence: Tensor
    weights: Tensor | None
    ratios: RatioStats | None


def _terms(
    config: ObjectiveConfig,
    counts: GlobalCounts,
    stats: TokenStats,
    responses: _Responses,
    cp_group: dist.ProcessGroup | None,
    weight: float,
) -> _Terms:
    """Return λ L_tok and L_seq of these responses, whose stats are [n]."""
    # A term that is absent must not have a gradient of zero, which costs a pass; but some gradient the pipeline needs.
    zero = stats.kl.new_zeros(()) if responses.scored or responses.rewarded else stats.student_logprob.sum() * 0.0
    token, sequence, weights, ratios = zero, zero, None, None
    policy = replace(config.policy_gradient, normalization=config.policy_normalization)
    tokens = PolicyTokens(
        stats.student_logprob,
        responses.old_logprobs,
        responses.engine_logprobs,
        responses.cu_seqlens,
        responses.lengths,
        responses.advantages,
    )
    if responses.scored:
        divergence = cord.token_divergence(stats) if config.distils else -stats.student_logprob
        weights = token_weights(
            divergence,
            responses.cu_seqlens,
            config.token_weights,
            entropy=stats.entropy,
            log_ratio=stats.student_logprob.detach() - responses.engine_logprobs
            if config.token_weights.needs_ratio
            else None,
            positions=responses.positions,
            cp_group=cp_group,
        )
        if responses.gate is not None:
            weights = weights * responses.gate.to(weights.dtype)
        if config.divergence.kind == "sampled":
            ratio = importance_weights(stats.student_logprob, tokens, policy.importance_cap)
            # NaN where the engine's weights are broken: nothing to learn from.
            ratio = ratio.masked_fill(responses.engine_logprobs.isnan(), torch.nan)
            divergence = sampled_reverse_kl(stats.student_logprob, stats.teacher_logprob, ratio)
        elif config.divergence.kind == "one_sided":
            divergence = one_sided_gap(stats.student_logprob, stats.teacher_logprob)
        if config.normalization == "response_mean":
            lengths = responses.lengths[response_of_token(divergence, responses.cu_seqlens)]
            divergence = divergence / lengths
        token = weight * cord.token_loss(divergence, weights, counts.scored)
    if responses.rewarded:
        loss, ratios = policy_loss(policy, tokens, counts.policy, cp_group=cp_group)
        sequence = policy.weight * loss
    return _Terms(token, sequence, weights, ratios)


def _sum(scalars: list[Tensor]) -> Tensor:
    """Return the chunks' sum without gradient; of a single chunk its very number."""
    return scalars[0].detach() if len(scalars) == 1 else torch.stack(scalars).sum().detach()
