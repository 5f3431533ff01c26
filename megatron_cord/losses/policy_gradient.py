"""Beside L_seq (``cord.sequence_loss``): options, rewards, GRPO's normalisation, importance weights, sampled tokens.

The options' terms are in ``surrogates``, their composition in ``policy_loss``.

Shapes: N packed response tokens, B responses; ``cu_seqlens`` [B+1] as in ``token_weights``. A group is the responses to
    one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import first_index
from megatron_cord.losses.cord import advantages
from megatron_cord.losses.responses import response_of_token
from megatron_cord.losses.weight_schedule import WeightSchedule


@dataclass(frozen=True)
class PolicyGradientConfig:
    """L_seq, the second term of the objective."""

    enabled: bool = True  #: whether L_seq is added to L_tok
    weight: float = 1.0  #: factor of L_seq; the paper has none
    weight_schedule: WeightSchedule = field(default_factory=WeightSchedule)  #: how the factor changes
    importance_cap: float = 2.0  #: upper bound of the ratio of the trainer's to the engine's probability of a token
    normalize_std: bool = False  #: divide advantages by the group's standard deviation (GRPO), which the paper does not
    #: a token's term: reinforce (the paper), A log p; clipped (PPO, GRPO, DAPO, GSPO), of the ratio to the policy
    #: before the step's first update; cispo, A log p times that ratio, bounded; docs/algorithms.md compares them
    surrogate: Literal["reinforce", "clipped", "cispo"] = "reinforce"
    ratio: Literal["token", "sequence"] = "token"  #: of clipped and cispo: each token's own, or the response's (GSPO)
    clip_low: float = 0.2  #: of clipped: a ratio below 1 - clip_low has no gradient where the advantage is negative
    #: of clipped: a ratio above 1 + clip_high has no gradient where the advantage is positive; of cispo: the ratio's
    #: upper bound is 1 + clip_high
    clip_high: float = 0.2
    #: what L_seq is divided by: objective (as objective.normalization), response (the number of responses, the paper),
    #: response_mean (the same, of means over each response's tokens: GRPO, GSPO), token (the number of tokens: DAPO),
    #: max_length (responses times rollout.max_new_tokens: Dr. GRPO)
    normalization: Literal["objective", "response", "response_mean", "token", "max_length"] = "objective"
    filter_truncated: bool = False  #: responses that were cut at rollout.max_new_tokens have no part in L_seq (DAPO)

    def __post_init__(self) -> None:
        if not self.importance_cap > 0:
            raise CordError(f"importance_cap must be positive, but is {self.importance_cap}")
        if self.weight_schedule.kind != "constant" and not self.enabled:
            raise CordError("weight_schedule has nothing to weigh: enabled is false")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise CordError(
                "objective.policy_gradient.clip_low must lie in [0, 1) and clip_high be at least 0, but they are "
                f"{self.clip_low} and {self.clip_high}"
            )
        if self.ratio == "sequence" and not self.has_ratio:
            raise CordError(
                "objective.policy_gradient.ratio=sequence needs a surrogate that has a ratio; set "
                "objective.policy_gradient.surrogate=clipped (GSPO) or cispo"
            )

    @property
    def has_ratio(self) -> bool:
        """Whether the term is of the ratio to the policy before the step's first update."""
        return self.surrogate != "reinforce"


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = False) -> Tensor:
    """A_i = r_i − mean of the group's rewards, ``cord.advantages``; exactly 0 in zero-variance groups.

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
    unequal = _unequal(rewards, group, num_groups)[group]
    result = torch.where(unequal, advantages(rewards, group, num_groups), 0.0)
    if normalize_std:
        zeros = rewards.new_zeros(num_groups)
        size = zeros.index_add(0, group, torch.ones_like(rewards))
        deviation = (zeros.index_add(0, group, result.square()) / size).sqrt()[group]
        result = result / torch.where(unequal, deviation, 1.0)
    return result


def has_reward_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return which responses belong to a group whose rewards differ; those of a zero-variance group have advantage 0.

    Args:
        rewards: as in ``group_advantages``.
        group_ids: likewise.

    Returns:
        bool [B].

    Raises:
        CordError: as ``group_advantages``.
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
    """ρ_t = min(p_trainer / p_engine, cap): corrects for a difference between the engine's model and the trained one.

    "token" takes each token's own ratio (truncated importance sampling: biased beyond a token, low variance, the usual
    choice). "sequence" takes the product over the response, the same for all its tokens: unbiased up to the cap, but
    its variance grows with length. Both log-probabilities are at temperature 1; that a rollout was sampled at another
    temperature is not corrected here.

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
            f"engine_logprob[{first_index(engine_logprob.isnan())}] is NaN; "
            "the engine must return a log-probability for every token"
        )
    if not cap > 0:
        raise CordError(f"the importance cap must be positive, but is {cap}")
    if level not in ("token", "sequence"):
        raise CordError(f"importance level {level!r} is unknown; choose token or sequence")
    log_ratio = student_logprob.detach() - engine_logprob.detach().to(student_logprob.dtype)
    if level == "sequence":
        sequence = response_of_token(student_logprob, cu_seqlens)
        log_ratio = log_ratio.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, log_ratio)[sequence]
    return truncated_ratio(log_ratio, cap)


def truncated_ratio(log_ratio: Tensor, cap: float) -> Tensor:
    """Return min(e^x, cap) of [N], without gradient; truncated before exp, which then cannot overflow."""
    return log_ratio.detach().clamp(max=math.log(cap)).exp()


def sampled_reverse_kl(student_logprob: Tensor, teacher_logprob: Tensor, importance_weights: Tensor) -> Tensor:
    """Return ρ_t (log p(y_t) − log q(y_t)) log p(y_t), [N]: the reverse KL as a policy gradient of the sampled tokens.

    The first two factors are numbers: each token has an advantage of its own. The gradient is an unbiased estimate of
    that of D_t, over tokens sampled at temperature 1, without a sum over the vocabulary; its value means nothing.
    Source: on-policy distillation (Thinking Machines, 2025), where a token's advantage is its own log-ratio, without
    later ones.

    Args:
        student_logprob: [N], differentiable.
        teacher_logprob: [N].
        importance_weights: [N], ρ_t (``truncated_importance_weights``).
    """
    cost = (student_logprob - teacher_logprob).detach()
    return importance_weights * cost * student_logprob


def one_sided_gap(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """Return ReLU(log q(y_t) − log p(y_t)), [N]: how far the student lags behind its teacher on its own tokens.

    Differentiable by the student's: a token that the teacher finds likelier is raised, no other is pushed down. Source:
    OPOD (arXiv 2607.20918), one-sided token guidance.

    Args:
        student_logprob: [N], log p(y_t), differentiable.
        teacher_logprob: [N], log q(y_t), used as numbers.
    """
    return (teacher_logprob.detach() - student_logprob).relu()


def _grouped(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return rewards as floating point, each one's group as an index from 0, and the number of groups."""
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise CordError(
            "rewards and group_ids must have the same shape [responses], "
            f"but have {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.to(torch.float32)
    if not rewards.isfinite().all():
        index = first_index(~rewards.isfinite())
        raise CordError(f"rewards[{index}] is {float(rewards[index])}; a reward must be a finite number")
    names, group = torch.unique(group_ids.to(rewards.device), return_inverse=True)
    return rewards, group, len(names)


def _unequal(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Return whether a group's rewards differ, bool [groups]."""
    empty = rewards.new_zeros(num_groups)
    highest = empty.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return highest > lowest
