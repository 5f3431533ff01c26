"""The formulas of one block of logits in plain torch: the readable reference of all backends.

A block is summed up by ``block_stats``; ``block_gradient`` turns the statistics of the whole vocabulary back into the
gradient of a block, without any communication. The division by the temperature comes after the maximum is subtracted:
before, it would round away digits of large logits.

Minus infinity is a legal logit (probability zero). Where both models have it, the entry counts for nothing. Where only
the distribution that the divergence divides by has it, the divergence is +inf by definition, and so it is here, even if
the other's probability underflows.

Shapes: N tokens; a block is [N, columns]. s and t are logits over the temperature τ, p and q the softmaxes, δ = log p −
    log q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_cord.losses.divergences import Block, Divergence, exponential
from megatron_cord.losses.kernels.backend import UpstreamGrads, upstream_rows
from megatron_cord.losses.statistics import GlobalStats, PartialStats

#: Elements that eager torch works on at a time on a CPU: 128 KiB of float32, so that the steps of a formula share the
#: second-level cache.
TILE_ELEMENTS = 2**15

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


class EagerBackend:
    """``Backend`` in plain torch, on tiles of rows; ``transform`` may replace each function by a faster equal one."""

    def __init__(self, transform: Transform = lambda function: function, tile: int = TILE_ELEMENTS) -> None:
        self._tile = tile
        self._partial_stats: Callable[..., PartialStats] = transform(_upcast_stats)
        self._second_sums: Callable[..., Tensor] = transform(_upcast_second_sums)
        self._gradient: Callable[..., None] = transform(_upcast_gradient)

    def partial_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        divergence: Divergence,
        temperature: float,
        dtype: torch.dtype,
    ) -> PartialStats:
        """Return the block's eight scalars, each [N]."""
        parts = [
            self._partial_stats(student[rows], teacher[rows], target[rows], divergence, temperature, dtype)
            for rows in self._tiles(student)
        ]
        return parts[0] if len(parts) == 1 else PartialStats(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def second_sums(
        self, student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
    ) -> Tensor:
        """Return the second pass's sums, [sums, N]."""
        parts = [
            self._second_sums(student[rows], teacher[rows], stats.rows(rows), divergence, temperature)
            for rows in self._tiles(student)
        ]
        return torch.cat(parts, dim=1)

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        stats: GlobalStats,
        divergence: Divergence,
        temperature: float,
        upstream: UpstreamGrads,
        out: Tensor,
    ) -> None:
        """Write the block's gradient into ``out`` [N, columns]."""
        for rows in self._tiles(student):
            self._gradient(
                student[rows],
                teacher[rows],
                target[rows],
                stats.rows(rows),
                divergence,
                temperature,
                upstream_rows(upstream, rows),
                out[rows],
            )

    def _tiles(self, block: Tensor) -> Iterator[slice]:
        num_tokens, columns = block.shape
        step = max(1, num_tokens) if block.is_cuda else max(1, self._tile // max(1, columns))
        return (slice(first, min(first + step, num_tokens)) for first in range(0, max(num_tokens, 1), step))


def block_stats(
    student: Tensor, teacher: Tensor, target: Tensor, divergence: Divergence, temperature: float
) -> PartialStats:
    """Sum up one block of columns.

    Args:
        student: [N, columns ≥ 1], float32 or float64.
        teacher: the same.
        target: int64 [N], the sampled token's column within this block; outside [0, columns) where another block holds
            it.
        divergence: what is compared.
        temperature: τ.
    """
    student_target, student_max = _pick(student, target), student.amax(1)
    s = _relative(student, student_max[:, None], temperature)
    student_exp = exponential(s)
    student_sum = student_exp.sum(1)
    entropy_sum = (student_exp * _finite(s)).sum(1)
    if not divergence.has_teacher:
        none = torch.zeros_like(student_sum)
        return PartialStats(
            student_max, student_sum, entropy_sum, none, student_max, student_sum, student_target, student_target
        )
    teacher_max = teacher.amax(1)
    t = _relative(teacher, teacher_max[:, None], temperature)
    teacher_exp = exponential(t)
    return PartialStats(
        student_max,
        student_sum,
        entropy_sum,
        divergence.block_sum(s, student_exp, t, teacher_exp),
        teacher_max,
        teacher_exp.sum(1),
        student_target,
        _pick(teacher, target),
    )


def block_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    stats: GlobalStats,
    divergence: Divergence,
    temperature: float,
    by_divergence: Tensor | None,
    by_entropy: Tensor | None,
    by_logprob: Tensor | None,
) -> Tensor:
    """Return the gradient with respect to one block of the student's logits.

    dz = τ⁻¹ {w_k · gradient of the divergence − w_e p (log p + entropy) + w_l (1_y − p)}, with the upstream gradients
    w.

    Args:
        student: [N, columns], the block again.
        teacher: the same.
        target: as in ``block_stats``.
        stats: of the whole vocabulary.
        divergence: what is compared.
        temperature: τ.
        by_divergence: [N], w_k; None leaves the term out.
        by_entropy: [N], w_e, likewise.
        by_logprob: [N], w_l, likewise.

    Returns:
        [N, columns]. A row whose divergence is +inf is NaN, unless its w_k is zero.
    """
    block = _normalised(student, teacher, stats, divergence, temperature)
    gradient = torch.zeros_like(block.p)
    if by_divergence is not None and divergence.has_teacher:
        gradient = divergence.gradient(block, stats, by_divergence / temperature)
    if by_entropy is not None:
        entropy_term = _finite(block.log_p) + stats.entropy[:, None]
        gradient = gradient - block.p * (by_entropy / temperature)[:, None] * entropy_term
    if by_logprob is not None:
        scaled = (by_logprob / temperature)[:, None]
        column = torch.arange(student.shape[1], device=student.device)
        gradient = gradient + torch.where(column == target[:, None], scaled, 0.0) - scaled * block.p
    return gradient


def _upcast_stats(
    student: Tensor, teacher: Tensor, target: Tensor, divergence: Divergence, temperature: float, dtype: torch.dtype
) -> PartialStats:
    return block_stats(student.to(dtype), teacher.to(dtype), target, divergence, temperature)


def _upcast_second_sums(
    student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
) -> Tensor:
    dtype = stats.entropy.dtype
    block = _normalised(student.to(dtype), teacher.to(dtype), stats, divergence, temperature)
    return divergence.second_sums(block, stats.threshold)


def _upcast_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    stats: GlobalStats,
    divergence: Divergence,
    temperature: float,
    upstream: UpstreamGrads,
    out: Tensor,
) -> None:
    dtype = stats.entropy.dtype
    out.copy_(block_gradient(student.to(dtype), teacher.to(dtype), target, stats, divergence, temperature, *upstream))


def _normalised(
    student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
) -> Block:
    log_p = _relative(student, stats.student_max[:, None], temperature) - stats.student_log_sum[:, None]
    if not divergence.has_teacher:
        return Block(log_p, exponential(log_p), log_p, teacher)
    log_q = _relative(teacher, stats.teacher_max[:, None], temperature) - stats.teacher_log_sum[:, None]
    return Block(log_p, exponential(log_p), log_q, teacher)


def _relative(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """Return (logits − maximum) / τ; −inf where the logit is −inf, even if the maximum is too."""
    difference = logits - torch.where(maximum == -torch.inf, 0.0, maximum)
    return difference if temperature == 1.0 else difference / temperature


def _finite(logs: Tensor) -> Tensor:
    """Return the logs with −inf made the smallest finite number, which a probability of zero takes to 0."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    """Return the target's logit, −inf where another block holds it."""
    held = (target >= 0) & (target < logits.shape[1])
    picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~held, -torch.inf)
