"""CORD's equations (arXiv 2601.16547), one function each, as the trainer computes them.

The student p_θ generates a response y from the audio prompt x^a; the teacher scores the same tokens from the text
prompt x^t of the same question.

    D_t     = KL( p_θ(·|y_<t, x^a) ‖ p_teacher(·|y_<t, x^t) )                     token_divergence
    w_t^KL  = α if t is among the K positions of y with the largest D_t, else 1   top_k_weights
    w_t^pos = β − (β − 1)(t − 1)/(T − 1)                                          position_weights
    w_t     = w_t^KL · w_t^pos                                                    combined_weights, cord_token_weights
    L_tok   = Σ_t w_t D_t, mean over responses (or tokens, as configured)         token_loss
    r(y)    = J(y, ŷ) ∈ {0, 1}                                                    megatron_cord.reward
    A_i     = r_i − mean(r over the group)                                        advantages
    L_seq   = −(1/N) Σ_i A_i log p_θ(y_i|x^a)                                     sequence_loss
    L       = L_tok + L_seq                                                       total_loss

Variants stand beside this page and are composed with it: other divergences in ``divergences``, other token weights in
``token_weights``, what GRPO and sampled-token distillation add in ``policy_gradient``, ratios of several updates in
``surrogates``; ``policy_loss`` is L_seq as configured. ``trainer.step.microbatch_loss`` composes L.

Shapes: N packed response tokens here, M tokens of whole responses, B responses; ``cu_seqlens`` [B+1].
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import check_weight_constants
from megatron_cord.losses.responses import Responses, rank_in_response, response_of_token, whole_responses
from megatron_cord.losses.statistics import TokenStats


def token_divergence(stats: TokenStats) -> Tensor:
    """D_t = KL(p_θ(·|y_<t, x^a) ‖ p_teacher(·|y_<t, x^t)) of each token, [N], differentiable.

    The sum over the whole vocabulary, which may be split over ranks, is ``divergences.ReverseKL``.
    """
    return stats.kl


def top_k_weights(responses: Responses, top_k: int, alpha: float) -> Tensor:
    """w_t^KL = α for the K positions of a response with the largest D_t, else 1; all of them if T ≤ K.

    The weights are computed from detached D_t. Of equal divergences the earlier position comes first.

    Returns:
        float64 [M].
    """
    return torch.where(rank_in_response(responses, responses.kl) < top_k, alpha, 1.0).double()


def position_weights(responses: Responses, beta: float) -> Tensor:
    """w_t^pos = β − (β − 1)(t − 1)/(T − 1): falls from β to 1; a response of a single token gets β.

    Returns:
        float64 [M].
    """
    fraction = responses.position.double() / (responses.length - 1).clamp(min=1)
    return beta - (beta - 1.0) * fraction


def combined_weights(responses: Responses, top_k: int, alpha: float, beta: float) -> Tensor:
    """w_t = w_t^KL · w_t^pos, float64 [M]."""
    return top_k_weights(responses, top_k, alpha) * position_weights(responses, beta)


def cord_token_weights(
    kl: Tensor,
    cu_seqlens: Tensor,
    *,
    top_k: int = 20,
    alpha: float = 2.0,
    beta: float = 2.0,
    positions: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """w_t = w_t^KL · w_t^pos of packed response tokens.

    Args:
        kl: [N], D_t, used as numbers. +inf and NaN count as the largest.
        cu_seqlens: integers [B+1], where response i is the tokens [cu_seqlens[i], cu_seqlens[i+1]).
        top_k: K, response positions of largest divergence.
        alpha: weight of those positions.
        beta: weight of the first position.
        positions: for context parallelism, see ``whole_responses``.
        cp_group: likewise.

    Returns:
        [N], dtype of ``kl``, no gradient.

    Raises:
        CordError: cu_seqlens that do not cover the N tokens, positions that do not make whole responses, or impossible
            constants.
    """
    check_weight_constants(top_k, alpha, beta)
    responses = whole_responses(kl, cu_seqlens, positions=positions, cp_group=cp_group)
    return responses.take(combined_weights(responses, top_k, alpha, beta)).to(kl.dtype)


def token_loss(divergence: Tensor, weights: Tensor, count: int) -> Tensor:
    """L_tok = Σ_t w_t D_t of these tokens, divided by the step's number of responses: a scalar.

    Args:
        divergence: [N], differentiable.
        weights: [N], w_t.
        count: responses over all ranks and microbatches of the step, or their tokens (``objective.normalization``).
    """
    return (weights * divergence).sum() / count


def advantages(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """A_i = r_i − mean(r over the group), without division by the standard deviation, [B].

    ``policy_gradient.group_advantages`` is the public form: it checks its arguments and offers GRPO's division.

    Args:
        rewards: floating point [B].
        group: int64 [B], each response's group, from 0.
        num_groups: how many groups there are.
    """
    zeros = rewards.new_zeros(num_groups)
    size = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / size
    return rewards - mean[group]


def sequence_loss(
    student_logprob: Tensor,
    cu_seqlens: Tensor,
    advantages: Tensor,
    count: int,
    *,
    importance_weights: Tensor | None = None,
) -> Tensor:
    """L_seq = −(1/N) Σ_i A_i log p_θ(y_i|x^a) of these responses, with log p(y_i) = Σ_t ρ_t log p(y_t): a scalar.

    Args:
        student_logprob: [N], differentiable.
        cu_seqlens: integers [B+1].
        advantages: [B], A_i, used as numbers.
        count: as in ``token_loss``, of the policy's responses; those of zero-variance groups are counted.
        importance_weights: [N], ρ_t, used as numbers (``policy_gradient.truncated_importance_weights``); None means 1,
            as in the paper.

    Raises:
        CordError: shapes that do not fit.
    """
    if advantages.shape != (len(cu_seqlens) - 1,):
        raise CordError(
            f"advantages must have shape [{len(cu_seqlens) - 1}], one for each sequence, "
            f"but has {list(advantages.shape)}"
        )
    response = response_of_token(student_logprob, cu_seqlens)
    terms = student_logprob
    if importance_weights is not None:
        if importance_weights.shape != student_logprob.shape:
            raise CordError(
                f"importance_weights has shape {list(importance_weights.shape)}, "
                f"but student_logprob {list(student_logprob.shape)}"
            )
        terms = importance_weights.detach() * student_logprob
    log_likelihood = terms.new_zeros(len(advantages)).index_add(0, response, terms)
    return (-advantages.detach().to(terms.dtype) * log_likelihood).sum() / count


def total_loss(token: Tensor, sequence: Tensor) -> Tensor:
    """L = L_tok + L_seq."""
    return token + sequence
