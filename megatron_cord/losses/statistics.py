"""Eight scalars a token that make every divergence a one-pass, one-collective sum over the vocabulary.

A block of columns of the logits is summed up by ``block_statistics``; ``merge_statistics`` joins blocks, splits and ranks in any order. So
KL, entropy and log-probability of a whole vocabulary need one all-gather of eight scalars a token. ``Totals`` holds what they come to, and
``gradient_block`` turns it back into the gradient of a block of logits without any further communication.

Shapes: N tokens, V vocabulary, K parts being merged. ``student`` and ``teacher`` are logits, float32 or float64; s and t in the formulas are
logits divided by the temperature τ. The division comes after the maximum is subtracted: before, it would round away digits of large logits.
p is the student's softmax, q the teacher's, and δ = log p − log q.

Minus infinity is a legal logit (probability zero). Where both have it, the entry counts for nothing. Where only the distribution that the
divergence divides by has it, the divergence is +inf by definition, and so it is here, even if the other's probability underflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cord.losses.kinds import Block, Kind, exponential


class Statistics(NamedTuple):
    """Sums over a part of the vocabulary, relative to the part's own maxima; every field is [N] (or [K, N] when K parts are stacked)."""

    student_max: Tensor  #: τ M_s, the largest logit; −inf for a part without mass
    student_sum: Tensor  #: L = Σ e^{s−M_s}
    entropy_sum: Tensor  #: B = Σ e^{s−M_s}(s − M_s)
    divergence_sum: Tensor  #: A; what is summed depends on the kind
    teacher_max: Tensor  #: τ M_t
    teacher_sum: Tensor  #: T = Σ e^{t−M_t}
    student_target: Tensor  #: τ s_y, the logit; −inf where the part does not hold the target
    teacher_target: Tensor  #: τ t_y


class Totals(NamedTuple):
    """What the whole vocabulary comes to; every field is [N].

    A maximum and its log-sum stay apart: added up, they would lose the digits that the gradient needs when the logits are far from zero.
    """

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor
    divergence: Tensor
    entropy: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    threshold: Tensor  #: the k-th largest of the teacher's logits; 0 for kinds that ask for none
    inner: Tensor  #: the scalar that a two-pass kind's gradient needs; 0 for the others


def empty_statistics(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Statistics:
    """The statistics of no column at all: the neutral element of the merge."""
    zero = torch.zeros(num_tokens, dtype=dtype, device=device)
    none = torch.full_like(zero, -torch.inf)
    return Statistics(none, zero, zero, zero, none, zero, none, none)


def block_statistics(student: Tensor, teacher: Tensor, target: Tensor, kind: Kind, temperature: float) -> Statistics:
    """Sums up one block of columns.

    Args:
        student, teacher: [N, columns ≥ 1].
        target: int64 [N], the sampled token's column within this block; outside [0, columns) where another block holds it.
    """
    student_target, student_max = _pick(student, target), student.amax(1)
    s = _relative(student, student_max[:, None], temperature)
    student_exp = exponential(s)
    student_sum = student_exp.sum(1)
    entropy_sum = (student_exp * _finite(s)).sum(1)
    if not kind.has_teacher:
        none = torch.zeros_like(student_sum)
        return Statistics(
            student_max, student_sum, entropy_sum, none, student_max, student_sum, student_target, student_target
        )
    teacher_max = teacher.amax(1)
    t = _relative(teacher, teacher_max[:, None], temperature)
    teacher_exp = exponential(t)
    return Statistics(
        student_max,
        student_sum,
        entropy_sum,
        kind.block_sum(s, student_exp, t, teacher_exp),
        teacher_max,
        teacher_exp.sum(1),
        student_target,
        _pick(teacher, target),
    )


def merge_statistics(parts: Statistics, kind: Kind, temperature: float) -> Statistics:
    """Joins K parts, fields [K, N], into one, fields [N]. Associative and commutative up to rounding."""
    student_max, teacher_max = parts.student_max.amax(0), parts.teacher_max.amax(0)
    student_shift = _shift(parts.student_max, student_max, temperature)
    teacher_shift = _shift(parts.teacher_max, teacher_max, temperature)
    student_scale, teacher_scale = student_shift.exp(), teacher_shift.exp()
    entropy_sum = student_scale * (parts.entropy_sum + parts.student_sum * student_shift)
    return Statistics(
        student_max=student_max,
        student_sum=(student_scale * parts.student_sum).sum(0),
        entropy_sum=entropy_sum.sum(0),
        divergence_sum=kind.merged_sum(parts, student_shift, student_scale, teacher_shift, teacher_scale).sum(0),
        teacher_max=teacher_max,
        teacher_sum=(teacher_scale * parts.teacher_sum).sum(0),
        student_target=parts.student_target.amax(0),
        teacher_target=parts.teacher_target.amax(0),
    )


def stack_statistics(parts: list[Statistics]) -> Statistics:
    """K parts with fields [N] as one with fields [K, N]."""
    return Statistics(*(torch.stack(field) for field in zip(*parts, strict=True)))


def totals_from_statistics(
    whole: Statistics, kind: Kind, temperature: float, threshold: Tensor | None = None
) -> Totals:
    """Divergence, entropy and log-probabilities from the statistics of the whole vocabulary, and the k-th largest teacher logit [N] if asked.

    A two-pass kind's divergence is still 0; ``complete_totals`` puts it in. The divergence is not clamped: rounding may leave it near −1e-7 in float32 where the two distributions agree.
    """
    student_log_sum, teacher_log_sum = whole.student_sum.log(), whole.teacher_sum.log()
    return Totals(
        student_max=whole.student_max,
        student_log_sum=student_log_sum,
        teacher_max=whole.teacher_max,
        teacher_log_sum=teacher_log_sum,
        divergence=kind.value(whole, student_log_sum, teacher_log_sum),
        entropy=student_log_sum - whole.entropy_sum / whole.student_sum,
        student_logprob=(whole.student_target - whole.student_max) / temperature - student_log_sum,
        teacher_logprob=(whole.teacher_target - whole.teacher_max) / temperature - teacher_log_sum,
        threshold=torch.zeros_like(student_log_sum) if threshold is None else threshold,
        inner=torch.zeros_like(student_log_sum),
    )


def second_sums(student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Tensor:
    """What a two-pass kind sums up over one block of columns, [sums, N]; arguments as in ``gradient_block``."""
    return kind.second_sums(_normalised(student, teacher, totals, kind, temperature), totals.threshold)


def complete_totals(totals: Totals, sums: Tensor, kind: Kind) -> Totals:
    """The totals with a two-pass kind's divergence, from its sums over the whole vocabulary [sums, N]."""
    divergence, inner = kind.second_value(sums)
    return totals._replace(divergence=divergence, inner=inner)


def gradient_block(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    totals: Totals,
    kind: Kind,
    temperature: float,
    weight_divergence: Tensor | None,
    weight_entropy: Tensor | None,
    weight_logprob: Tensor | None,
) -> Tensor:
    """Gradient with respect to one block of the student's logits.

    dz = τ⁻¹ {w_k · kind's gradient − w_e p (log p + entropy) + w_l (1_y − p)}, with the weights that arrive from above.

    Args:
        student, teacher: [N, columns], the block again.
        target: as in ``block_statistics``.
        weight_divergence, weight_entropy, weight_logprob: [N], gradient of the loss with respect to divergence, entropy and log p(y);
            None leaves the term out.

    Returns:
        [N, columns]. A row whose divergence is +inf is NaN, unless its ``weight_divergence`` is zero.
    """
    block = _normalised(student, teacher, totals, kind, temperature)
    gradient = torch.zeros_like(block.p)
    if weight_divergence is not None and kind.has_teacher:
        gradient = kind.gradient(block, totals, weight_divergence / temperature)
    if weight_entropy is not None:
        entropy_term = _finite(block.log_p) + totals.entropy[:, None]
        gradient = gradient - block.p * (weight_entropy / temperature)[:, None] * entropy_term
    if weight_logprob is not None:
        scaled = (weight_logprob / temperature)[:, None]
        column = torch.arange(student.shape[1], device=student.device)
        gradient = gradient + torch.where(column == target[:, None], scaled, 0.0) - scaled * block.p
    return gradient


def _normalised(student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Block:
    log_p = _relative(student, totals.student_max[:, None], temperature) - totals.student_log_sum[:, None]
    if not kind.has_teacher:
        return Block(log_p, exponential(log_p), log_p, teacher)
    log_q = _relative(teacher, totals.teacher_max[:, None], temperature) - totals.teacher_log_sum[:, None]
    return Block(log_p, exponential(log_p), log_q, teacher)


def _relative(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """(logits − maximum) / τ; −inf where the logit is −inf, even if the maximum is too."""
    difference = logits - torch.where(maximum == -torch.inf, 0.0, maximum)
    return difference if temperature == 1.0 else difference / temperature


def _shift(maxima: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """(maxima − maximum) / τ; 0 where a part has no mass, for its sums are 0 too."""
    return ((maxima - maximum) / temperature).masked_fill(maxima == -torch.inf, 0.0)


def _finite(logs: Tensor) -> Tensor:
    """−inf made the smallest finite number, which a probability of zero takes to 0."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    held = (target >= 0) & (target < logits.shape[1])
    picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~held, -torch.inf)
