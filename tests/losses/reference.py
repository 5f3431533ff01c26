"""What the losses must equal: float64, one rank, whole softmaxes, autograd; and inputs that reach the corners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_cord.losses import TokenStats, distillation_loss


@dataclass(frozen=True)
class Inputs:
    """N tokens, H hidden, V' columns, padding included; weights of kl, entropy and student_logprob in the loss."""

    student_hidden: Tensor  #: [N, H]
    student_weight: Tensor  #: [V', H]
    teacher_hidden: Tensor  #: [N, H]
    teacher_weight: Tensor  #: [V', H]
    target_ids: Tensor  #: int64 [N]
    weights: Tensor  #: float64 [3, N]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, [N, V'], rounded to the inputs' type."""
        return self.student_hidden @ self.student_weight.T, self.teacher_hidden @ self.teacher_weight.T


def make_inputs(
    *,
    num_tokens: int,
    hidden: int,
    columns: int,
    vocab_size: int,
    dtype: torch.dtype,
    distance: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Make random inputs whose targets spread evenly over the vocabulary, first and last token included.

    ``distance`` of the teacher from the student is relative to their size; small makes a small divergence.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_hidden, student_weight = normal(num_tokens, hidden), normal(columns, hidden) * 2.0 / hidden**0.5
    teacher_hidden = student_hidden + distance * normal(num_tokens, hidden)
    teacher_weight = student_weight + distance * normal(columns, hidden) / hidden**0.5
    return Inputs(
        student_hidden.to(dtype),
        student_weight.to(dtype),
        teacher_hidden.to(dtype),
        teacher_weight.to(dtype),
        torch.linspace(0, vocab_size - 1, num_tokens).long(),
        normal(3, num_tokens),
    )


def reference_stats(
    student: Tensor,
    teacher: Tensor,
    target_ids: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    k: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kl, entropy, student_logprob, teacher_logprob, each [N], of logits [N, V']; −inf logits are allowed."""
    log_p = torch.log_softmax(student.double()[:, :vocab_size] / temperature, dim=1)
    log_q = torch.log_softmax(teacher.double()[:, :vocab_size] / temperature, dim=1)
    if kind == "reverse_kl":
        divergence = _sum_of(log_p, log_p, log_q)
    elif kind == "forward_kl":
        divergence = _sum_of(log_q, log_q, log_p)
    elif kind == "jsd":
        nowhere = (log_p == -torch.inf) & (
            log_q == -torch.inf
        )  # where autograd of the logarithm of a sum of zeros is NaN
        log_m = torch.logaddexp(
            log_q.masked_fill(nowhere, 0.0) + math.log(beta), log_p.masked_fill(nowhere, 0.0) + math.log1p(-beta)
        )
        divergence = beta * _sum_of(log_q, log_q, log_m) + (1 - beta) * _sum_of(log_p, log_p, log_m)
    else:
        inside = log_q >= log_q.topk(min(k, log_q.shape[1]), dim=1).values[:, -1:]
        divergence = _top_k(log_q, log_p, inside) if kind == "forward_topk" else _top_k(log_p, log_q, inside)
    entropy = -_sum_of(log_p, log_p, torch.zeros_like(log_p))
    target = target_ids[:, None]
    return divergence, entropy, log_p.gather(1, target)[:, 0], log_q.gather(1, target)[:, 0]


def reference_logits_gradient(
    student: Tensor,
    teacher: Tensor,
    target_ids: Tensor,
    weights: Tensor,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(stats, ∂student [N, V']) of the loss Σ weights · (kl, entropy, student_logprob), weights float64 [3, N]."""
    student = student.detach().double().requires_grad_()
    stats = reference_stats(student, teacher, target_ids, **options)
    (gradient,) = torch.autograd.grad((torch.stack(stats[:3]) * weights).sum(), student)
    return tuple(stat.detach() for stat in stats), gradient


def reference_hidden_gradients(inputs: Inputs, **options: Any) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Return stats, ∂student_hidden [N, H] and ∂student_weight [V', H] of the same loss."""
    hidden, weight = inputs.student_hidden.double(), inputs.student_weight.double()
    teacher = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
    stats, gradient = reference_logits_gradient(
        hidden @ weight.T, teacher, inputs.target_ids, inputs.weights, **options
    )
    return stats, gradient @ weight, gradient.T @ hidden


def weighted(stats: TokenStats, weights: Tensor) -> Tensor:
    """Return the loss Σ weights · (kl, entropy, student_logprob) , weights [3, N], or [1, N] of the divergence."""
    return (torch.stack([stats.kl, stats.entropy, stats.student_logprob][: len(weights)]) * weights).sum()


def weighted_loss(weights: Tensor, *arguments: Tensor, **options: Any) -> tuple[Tensor, TokenStats]:
    """``weighted`` through ``distillation_loss``, and the stats."""
    return distillation_loss(lambda stats, rows: weighted(stats, weights[:, rows]), *arguments, **options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _top_k(log_a: Tensor, log_b: Tensor, inside: Tensor) -> Tensor:
    """Return KL(a‖b) when all tokens but those inside, the teacher's k likeliest (ties included), are one."""
    tail_a, tail_b = ((log_x.exp() * ~inside).sum(1) for log_x in (log_a, log_b))
    tail = torch.where(tail_a > 0, tail_a * (tail_a.log() - tail_b.log()), 0.0)
    return _sum_of(log_a.masked_fill(~inside, -torch.inf), log_a, log_b) + tail


def _sum_of(log_weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return Σ e^log_weight (first − second): 0 without weight; +inf with weight where second is −inf."""
    none = log_weight == -torch.inf
    difference = first.masked_fill(none, 0.0) - second.masked_fill(none, 0.0)
    return (log_weight.exp() * difference).masked_fill(difference == torch.inf, torch.inf).sum(1)
