"""The block's statistics and gradient as Triton kernels: each reads its logits once and keeps everything else in registers.

One program has one token. The statistics kernel runs over the block's columns online, as ``merge_statistics`` does over blocks; the gradient
kernel has a column tile to each program. The second pass of the two-pass kinds stays eager torch. float64 is not for GPUs' kernels: such
inputs are refused. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is slow and for tests.

Shapes: N tokens; a block is [N, columns], its rows contiguous or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.backends import EagerBackend, Weights
from megatron_cord.losses.kinds import ForwardKL, Kind, NoTeacher, ReverseKL
from megatron_cord.losses.statistics import Statistics, Totals
from megatron_cord.losses.two_pass_kinds import JensenShannon, TopK

#: Columns that a program works on at a time, and its warps.
TILE_COLUMNS = 4096
WARPS = 8

#: The kinds by number, for the kernels.
CODES: dict[type, int] = {NoTeacher: 0, ReverseKL: 1, ForwardKL: 2, JensenShannon: 3, TopK: 4}


class TritonBackend:
    """``Backend`` for CUDA tensors whose rows' elements lie side by side."""

    def __init__(self) -> None:
        self._eager = EagerBackend()

    def statistics(
        self, student: Tensor, teacher: Tensor, target: Tensor, kind: Kind, temperature: float, dtype: torch.dtype
    ) -> Statistics:
        if dtype != torch.float32:
            raise CordError("backend triton computes in float32, but an input is float64; choose eager or compile")
        num_tokens, columns = student.shape
        student, teacher = _rows_together(student), _rows_together(teacher)
        out = torch.empty(8, num_tokens, dtype=torch.float32, device=student.device)
        if num_tokens > 0:
            _statistics_kernel[(num_tokens,)](
                student, teacher, target, out, num_tokens, columns, student.stride(0), teacher.stride(0), 1.0 / temperature,
                KIND=CODES[type(kind)], TILE=_tile(columns), num_warps=WARPS,
            )  # fmt: skip
        return Statistics(*out.unbind(0))

    def second_sums(self, student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Tensor:
        return self._eager.second_sums(student, teacher, totals, kind, temperature)

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        totals: Totals,
        kind: Kind,
        temperature: float,
        weights: Weights,
        out: Tensor,
    ) -> None:
        num_tokens, columns = student.shape
        if num_tokens == 0:
            return
        student, teacher = _rows_together(student), _rows_together(teacher)
        scalars = torch.stack([field.to(torch.float32) for field in totals])
        present = [weight is not None for weight in weights]
        given = torch.stack(
            [torch.zeros_like(totals.entropy) if weight is None else weight.to(torch.float32) for weight in weights]
        )
        tile = _tile(columns)
        target_out = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
        beta = kind.beta if isinstance(kind, JensenShannon) else 0.5
        _gradient_kernel[(num_tokens, triton.cdiv(columns, tile))](
            student, teacher, target, scalars, given, target_out, num_tokens, columns, student.stride(0), teacher.stride(0),
            target_out.stride(0), 1.0 / temperature, beta, KIND=CODES[type(kind)] if present[0] else 0, ENTROPY=present[1], LOGPROB=present[2],
            TILE=tile, num_warps=WARPS,
        )  # fmt: skip
        if target_out is not out:
            out.copy_(target_out)


def _rows_together(block: Tensor) -> Tensor:
    return block if block.stride(1) == 1 else block.contiguous()


def _tile(columns: int) -> int:
    return min(TILE_COLUMNS, triton.next_power_of_2(max(columns, 1)))


@triton.jit
def _safe(maximum):  # type: ignore[no-untyped-def]
    """The maximum to subtract: 0 for a part without mass, so that −inf − (−inf) does not arise."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _difference(a, b):  # type: ignore[no-untyped-def]
    """A − b where a has mass and 0 elsewhere; +inf where b has none."""
    return tl.where(a == float("-inf"), 0.0, tl.where(b == float("-inf"), float("inf"), a - b))


@triton.jit
def _weighted(exp_a, a, b):  # type: ignore[no-untyped-def]
    """e^a (a − b); +inf where b has no mass and a has, even if e^a underflows."""
    difference = _difference(a, b)
    return tl.where(difference == float("inf"), float("inf"), exp_a * difference)


@triton.jit
def _statistics_kernel(
    student, teacher, target, out, num_tokens, columns, student_stride, teacher_stride, scale, KIND: tl.constexpr, TILE: tl.constexpr
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Out [8, N], the fields of ``Statistics``. m: maxima; l: Σ e^s; b: Σ e^s s; a: the divergence's sum."""
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    m_s, m_t = -infinity, -infinity
    l_s, l_t, b, a = 0.0, 0.0, 0.0, 0.0
    for first in range(0, columns, TILE):
        column = first + tl.arange(0, TILE)
        inside = column < columns
        z_s = tl.load(student + row * student_stride + column, mask=inside, other=-infinity).to(tl.float32)
        new_s = tl.maximum(m_s, tl.max(z_s, 0))
        s = (z_s - _safe(new_s)) * scale
        shift_s = tl.where(m_s == -infinity, 0.0, (m_s - _safe(new_s)) * scale)
        exp_s, factor_s = tl.exp(s), tl.exp(shift_s)
        if KIND != 0:
            z_t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=-infinity).to(tl.float32)
            new_t = tl.maximum(m_t, tl.max(z_t, 0))
            t = (z_t - _safe(new_t)) * scale
            shift_t = tl.where(m_t == -infinity, 0.0, (m_t - _safe(new_t)) * scale)
            exp_t, factor_t = tl.exp(t), tl.exp(shift_t)
            if KIND == 1:
                a = tl.where(a == infinity, infinity, factor_s * (a + l_s * (shift_s - shift_t))) + tl.sum(
                    _weighted(exp_s, s, t), 0
                )
            if KIND == 2:
                a = tl.where(a == infinity, infinity, factor_t * (a + l_t * (shift_t - shift_s))) + tl.sum(
                    _weighted(exp_t, t, s), 0
                )
            l_t = factor_t * l_t + tl.sum(exp_t, 0)
            m_t = new_t
        b = factor_s * (b + l_s * shift_s) + tl.sum(exp_s * tl.where(s == -infinity, 0.0, s), 0)
        l_s = factor_s * l_s + tl.sum(exp_s, 0)
        m_s = new_s
    chosen = tl.load(target + row)
    held = (chosen >= 0) & (chosen < columns)
    y_s = tl.load(student + row * student_stride + chosen, mask=held, other=-infinity).to(tl.float32)
    y_t = y_s
    if KIND != 0:
        y_t = tl.load(teacher + row * teacher_stride + chosen, mask=held, other=-infinity).to(tl.float32)
    else:
        m_t, l_t = m_s, l_s
    tl.store(out + row, m_s)
    tl.store(out + num_tokens + row, l_s)
    tl.store(out + 2 * num_tokens + row, b)
    tl.store(out + 3 * num_tokens + row, a)
    tl.store(out + 4 * num_tokens + row, m_t)
    tl.store(out + 5 * num_tokens + row, l_t)
    tl.store(out + 6 * num_tokens + row, y_s)
    tl.store(out + 7 * num_tokens + row, y_t)


@triton.jit
def _gradient_kernel(
    student, teacher, target, totals, weights, out, num_tokens, columns, student_stride, teacher_stride, out_stride, scale, beta,
    KIND: tl.constexpr, ENTROPY: tl.constexpr, LOGPROB: tl.constexpr, TILE: tl.constexpr
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Out [N, columns], ``gradient_block``; totals [10, N] are the fields of ``Totals``, weights [3, N]."""
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    z_s = tl.load(student + row * student_stride + column, mask=inside, other=-infinity).to(tl.float32)
    log_p = (z_s - tl.load(totals + row)) * scale - tl.load(totals + num_tokens + row)
    p = tl.exp(log_p)
    none = log_p == -infinity
    gradient = tl.zeros_like(p)
    if KIND != 0:
        weight = tl.load(weights + row)
        z_t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=-infinity).to(tl.float32)
        log_q = (z_t - tl.load(totals + 2 * num_tokens + row)) * scale - tl.load(totals + 3 * num_tokens + row)
        divergence = tl.where(weight == 0.0, 0.0, tl.load(totals + 4 * num_tokens + row))
        inner = tl.load(totals + 9 * num_tokens + row)
        if KIND == 1:
            gradient = weight * p * (tl.where(none, 0.0, tl.where(weight == 0.0, 0.0, log_p - log_q)) - divergence)
        if KIND == 2:
            gradient = weight * (p - tl.exp(log_q))
        if KIND == 3:
            minus_delta = tl.where(none, 0.0, log_q - log_p) + tl.log(beta)
            other = tl.log(1.0 - beta)
            larger = tl.maximum(minus_delta, other)
            u = -(1.0 - beta) * (larger + tl.log(tl.exp(minus_delta - larger) + tl.exp(other - larger)))
            gradient = weight * p * (tl.where(none, 0.0, u) - inner)
        if KIND == 4:
            delta = tl.where(z_t >= tl.load(totals + 8 * num_tokens + row), log_p - log_q, inner)
            gradient = weight * p * tl.where(none, 0.0, tl.where(weight == 0.0, 0.0, delta - divergence))
    if ENTROPY:
        finite = tl.where(none, 0.0, log_p + tl.load(totals + 5 * num_tokens + row))
        gradient = gradient - tl.load(weights + num_tokens + row) * p * finite
    if LOGPROB:
        by_logprob = tl.load(weights + 2 * num_tokens + row)
        gradient = gradient + tl.where(column == tl.load(target + row), by_logprob, 0.0) - by_logprob * p
    tl.store(out + row * out_stride + column, (gradient * scale).to(out.dtype.element_ty), mask=inside)
