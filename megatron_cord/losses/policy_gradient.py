"""L_seq, the sequence level of CORD: a group's rewards become advantages, and advantages push the log-probability of whole responses.

Shapes: N packed response tokens, B responses; ``cu_seqlens`` [B+1] as in ``token_weights``. A group is the responses to one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import check_cu_seqlens, first_index


@dataclass(frozen=True)
class PolicyGradientConfig:
    """L_seq, the second term of the objective."""

    enabled: bool = True  #: whether L_seq is added to L_tok
    weight: float = 1.0  #: factor of L_seq; the paper has none
    importance_cap: float = 2.0  #: upper bound of the ratio of the trainer's to the engine's probability of a token
    normalize_std: bool = False  #: divide advantages by the group's standard deviation (GRPO), which the paper does not

    def __post_init__(self) -> None:
        if not self.importance_cap > 0:
            raise CordError(f"importance_cap must be positive, but is {self.importance_cap}")


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = False) -> Tensor:
    """A_i = r_i − mean of the group's rewards (arXiv 2601.16547: without division by the standard deviation).

    Args:
        rewards: [B], floating point or integer.
        group_ids: integers [B], any values, in any order; equal means the same prompt.
        normalize_std: divide by the group's population standard deviation, as GRPO does.

    Returns:
        [B], rewards' type (float32 for integers), no gradient; exactly 0 where all rewards of a group are equal.

    Raises:
        CordError: shapes that differ, or a reward that is not finite.
    """
    rewards, group, num_groups = _grouped(rewards, group_ids)
    zeros = rewards.new_zeros(num_groups)
    size = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / size
    unequal = _unequal(rewards, group, num_groups)[group]
    advantages = torch.where(unequal, rewards - mean[group], 0.0)
    if normalize_std:
        deviation = (zeros.index_add(0, group, advantages.square()) / size).sqrt()[group]
        advantages = advantages / torch.where(unequal, deviation, 1.0)
    return advantages


def has_reward_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return which responses belong to a group whose rewards differ; those of a zero-variance group have advantage 0.

    Args, raises: as ``group_advantages``.

    Returns:
        bool [B].
    """
    rewards, group, num_groups = _grouped(rewards, group_ids)
    return _unequal(rewards, group, num_groups)[group]


def truncated_importance_weights(
    student_logprob: Tensor,
    engine_logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """min(p_trainer / p_engine, cap): corrects that the engine which sampled is not quite the model that is trained.

    "token" takes each token's own ratio (truncated importance sampling: biased beyond a token, low variance, the usual choice).
    "sequence" takes the product over the response, the same for all its tokens: unbiased up to the cap, but its variance grows with length.
    Both log-probabilities are at temperature 1; that a rollout was sampled at another temperature is not corrected here.

    Args:
        student_logprob: [N], of the trainer; used as a number.
        engine_logprob: [N], of the engine.
        cu_seqlens: integers [B+1].
        cap: the largest weight, > 0.
        level: "token" or "sequence".

    Returns:
        [N], student_logprob's type, no gradient.

    Raises:
        CordError: shapes that differ, cap ≤ 0, an unknown level, or an engine log-probability that is NaN.
    """
    if engine_logprob.shape != student_logprob.shape:
        raise CordError(
            f"engine_logprob has shape {list(engine_logprob.shape)}, but student_logprob {list(student_logprob.shape)}"
        )
    if engine_logprob.isnan().any():
        raise CordError(
            f"engine_logprob[{first_index(engine_logprob.isnan())}] is NaN; the engine must return a log-probability for every token"
        )
    if not cap > 0:
        raise CordError(f"the importance cap must be positive, but is {cap}")
    if level not in ("token", "sequence"):
        raise CordError(f"importance level {level!r} is unknown; choose token or sequence")
    log_ratio = student_logprob.detach() - engine_logprob.detach().to(student_logprob.dtype)
    if level == "sequence":
        sequence = _sequence_of_token(student_logprob, cu_seqlens)
        log_ratio = log_ratio.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, log_ratio)[sequence]
    return log_ratio.clamp(max=math.log(cap)).exp()  # truncated before exp, which then cannot overflow


def policy_gradient_loss(
    student_logprob: Tensor, cu_seqlens: Tensor, advantages: Tensor, *, importance_weights: Tensor | None = None
) -> Tensor:
    """Each response's part of L_seq = −(1/N) Σ_i A_i log p(y_i): −A_i Σ_t w_t log p(y_t), before the mean over responses.

    Args:
        student_logprob: [N], differentiable.
        cu_seqlens: integers [B+1].
        advantages: [B], used as numbers.
        importance_weights: [N], w_t, used as numbers (``truncated_importance_weights``); None means 1.

    Returns:
        [B], to be summed and divided by the number of responses, which only the caller knows over ranks and microbatches.

    Raises:
        CordError: shapes that do not fit.
    """
    if advantages.shape != (len(cu_seqlens) - 1,):
        raise CordError(
            f"advantages must have shape [{len(cu_seqlens) - 1}], one for each sequence, but has {list(advantages.shape)}"
        )
    sequence = _sequence_of_token(student_logprob, cu_seqlens)
    terms = student_logprob
    if importance_weights is not None:
        if importance_weights.shape != student_logprob.shape:
            raise CordError(
                f"importance_weights has shape {list(importance_weights.shape)}, but student_logprob {list(student_logprob.shape)}"
            )
        terms = importance_weights.detach() * student_logprob
    log_likelihood = terms.new_zeros(len(advantages)).index_add(0, sequence, terms)
    return -advantages.detach().to(terms.dtype) * log_likelihood


def _sequence_of_token(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of each token, the index of its sequence; int64 [N]."""
    check_cu_seqlens(cu_seqlens, tokens.shape[0])
    lengths = cu_seqlens.to(tokens.device).diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)


def _grouped(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rewards as floating point, each one's group as an index from 0, and the number of groups."""
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise CordError(
            f"rewards and group_ids must have the same shape [responses], but have {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.to(torch.float32)
    if not rewards.isfinite().all():
        index = first_index(~rewards.isfinite())
        raise CordError(f"rewards[{index}] is {float(rewards[index])}; a reward must be a finite number")
    names, group = torch.unique(group_ids.to(rewards.device), return_inverse=True)
    return rewards, group, len(names)


def _unequal(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Whether a group's rewards differ, bool [groups]."""
    empty = rewards.new_zeros(num_groups)
    highest = empty.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return highest > lowest
