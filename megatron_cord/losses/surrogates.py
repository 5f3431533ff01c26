"""GRPO's relatives: the ratio of the present to the old policy, and what a token's term in L_seq makes of it.

The old policy is the trainer's own at the beginning of the step, before the first of its updates.

    r_t = p_θ(y_t) / p_old(y_t)                        token_ratio       PPO (1707.06347), GRPO (2402.03300)
    s   = (p_θ(y) / p_old(y))^(1/T)                    sequence_ratio    GSPO (2507.18071)
    −min(r A, clip(r, 1 − ε_low, 1 + ε_high) A)        clipped_terms     PPO; ε_high > ε_low: DAPO (2503.14476)
    −sg[min(r, 1 + ε_high)] A log p_θ(y_t)             cispo_terms       CISPO (2506.13585), without a lower bound

Numbers are arXiv's; sg stops the gradient. ``policy_loss`` weighs and adds the terms.

Shapes: N packed response tokens of this rank, B responses; ``cu_seqlens`` [B+1].
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.responses import response_means


def token_ratio(student_logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """r_t = p_θ(y_t) / p_old(y_t), [N], differentiable.

    Args:
        student_logprob: [N], differentiable.
        old_logprob: [N], used as numbers.
    """
    return (student_logprob - old_logprob.detach()).exp()


def sequence_ratio(
    student_logprob: Tensor,
    old_logprob: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    *,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return s = (p_θ(y) / p_old(y))^(1/T) of each token's response, [N], differentiable; equal within a response.

    The gradient is that of GSPO-token, sg[s] p_θ(y_t) / sg[p_θ(y_t)]: summed over the T tokens of a response with equal
    factors, it is the gradient of T s. So no gradient passes between the ranks that share a response.

    Args:
        student_logprob: [N], differentiable.
        old_logprob: [N], used as numbers.
        cu_seqlens: integers [B+1].
        lengths: [B], T of the whole responses.
        cp_group: the ranks that share the responses; collective over them.
    """
    log_ratio = (student_logprob - old_logprob).detach()
    mean = response_means(log_ratio, cu_seqlens, lengths, cp_group=cp_group)
    return (mean + (student_logprob - student_logprob.detach())).exp()


def clipped_terms(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """−min(r A, clip(r, 1 − ε_low, 1 + ε_high) A), [N], differentiable by the ratio.

    Args:
        ratio: [N], r or s.
        advantages: [N], A of each token's response.
        clip_low: ε_low.
        clip_high: ε_high.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def cispo_terms(student_logprob: Tensor, ratio: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """−sg[min(r, 1 + ε_high)] A log p_θ(y_t), [N]: no token loses its gradient, only its weight is bounded.

    Args:
        student_logprob: [N], differentiable.
        ratio: [N], r or s, used as numbers.
        advantages: [N], A of each token's response.
        clip_high: ε_high.
    """
    return -ratio.detach().clamp(max=1.0 + clip_high) * advantages * student_logprob
