"""A block's statistics and gradient as Triton kernels: each reads its logits once and keeps the rest in registers.

One program has one token. The statistics kernel runs over the block's columns online, as ``merge_stats`` does over
blocks; the gradient kernel has a column tile to each program. The second pass of the two-pass divergences stays eager
torch. float64 inputs are refused. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is slow
and for tests.

Shapes: N tokens; a block is [N, columns], its rows contiguous or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.divergences import Divergence, ForwardKL, JensenShannon, NoTeacher, ReverseKL, TopK
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.kernels.eager import EagerBackend
from megatron_cord.losses.statistics import GlobalStats, PartialStats

#: Columns that a program works on at a time, and its warps.
TILE_COLUMNS = 4096
WARPS = 8

#: The divergences by number, for the kernels.
CODES: dict[type, int] = {NoTeacher: 0, ReverseKL: 1, ForwardKL: 2, JensenShannon: 3, TopK: 4}


class TritonBackend:
    """``Backend`` for CUDA tensors whose rows' elements lie side by side."""

    def __init__(self) -> None:
        self._eager = EagerBackend()

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
        if dtype != torch.float32:
            raise CordError("backend triton computes in float32, but an input is float64; choose eager or compile")
        num_tokens, columns = student.shape
        student, teacher = _rows_together(student), _rows_together(teacher)
        out = torch.empty(8, num_tokens, dtype=torch.float32, device=student.device)
        if num_tokens > 0:
            _statistics_kernel[(num_tokens,)](
                student,
                teacher,
                target,
                out,
                num_tokens,
                columns,
                student.stride(0),
                teacher.stride(0),
                1.0 / temperature,
                divergence_code=CODES[type(divergence)],
                tile_columns=_tile(columns),
                num_warps=WARPS,
            )
        return PartialStats(*out.unbind(0))

    def second_sums(
        self, student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
    ) -> Tensor:
        """Return the second pass's sums, [sums, N]."""
        return self._eager.second_sums(student, teacher, stats, divergence, temperature)

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
        num_tokens, columns = student.shape
        if num_tokens == 0:
            return
        student, teacher = _rows_together(student), _rows_together(teacher)
        scalars = torch.stack([field.to(torch.float32) for field in stats])
        present = [grad is not None for grad in upstream]
        given = torch.stack(
            [torch.zeros_like(stats.entropy) if grad is None else grad.to(torch.float32) for grad in upstream]
        )
        tile = _tile(columns)
        target_out = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
        beta = divergence.beta if isinstance(divergence, JensenShannon) else 0.5
        _gradient_kernel[(num_tokens, triton.cdiv(columns, tile))](
            student,
            teacher,
            target,
            scalars,
            given,
            target_out,
            num_tokens,
            columns,
            student.stride(0),
            teacher.stride(0),
            target_out.stride(0),
            1.0 / temperature,
            beta,
            divergence_code=CODES[type(divergence)] if present[0] else 0,
            with_entropy=present[1],
            with_logprob=present[2],
            tile_columns=tile,
            num_warps=WARPS,
        )
        if target_out is not out:
            out.copy_(target_out)


def _rows_together(block: Tensor) -> Tensor:
    return block if block.stride(1) == 1 else block.contiguous()


def _tile(columns: int) -> int:
    return min(TILE_COLUMNS, int(triton.next_power_of_2(max(columns, 1))))


@triton.jit
def _safe(maximum):  # type: ignore[no-untyped-def]
    """Return the maximum to subtract: 0 for a part without mass, so that −inf − (−inf) does not arise."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _difference(a, b):  # type: ignore[no-untyped-def]
    """Return a − b where a has mass and 0 elsewhere; +inf where b has none."""
    return tl.where(a == float("-inf"), 0.0, tl.where(b == float("-inf"), float("inf"), a - b))


@triton.jit
def _weighted(exp_a, a, b):  # type: ignore[no-untyped-def]
    """Return e^a (a − b); +inf where b has no mass and a has, even if e^a underflows."""
    difference = _difference(a, b)
    return tl.where(difference == float("inf"), float("inf"), exp_a * difference)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def]
    student,
    teacher,
    target,
    out,
    num_tokens,
    columns,
    student_stride,
    teacher_stride,
    scale,
    divergence_code: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Write the fields of ``PartialStats`` to out [8, N]. m: maxima; l: Σ e^s; b: Σ e^s s; a: the divergence's sum."""
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    m_s, m_t = -infinity, -infinity
    l_s, l_t, b, a = 0.0, 0.0, 0.0, 0.0
    for first in range(0, columns, tile_columns):
        column = first + tl.arange(0, tile_columns)
        inside = column < columns
        z_s = tl.load(student + row * student_stride + column, mask=inside, other=-infinity).to(tl.float32)
        new_s = tl.maximum(m_s, tl.max(z_s, 0))
        s = (z_s - _safe(new_s)) * scale
        shift_s = tl.where(m_s == -infinity, 0.0, (m_s - _safe(new_s)) * scale)
        exp_s, factor_s = tl.exp(s), tl.exp(shift_s)
        if divergence_code != 0:
            z_t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=-infinity).to(tl.float32)
            new_t = tl.maximum(m_t, tl.max(z_t, 0))
            t = (z_t - _safe(new_t)) * scale
            shift_t = tl.where(m_t == -infinity, 0.0, (m_t - _safe(new_t)) * scale)
            exp_t, factor_t = tl.exp(t), tl.exp(shift_t)
            if divergence_code == 1:
                a = tl.where(a == infinity, infinity, factor_s * (a + l_s * (shift_s - shift_t))) + tl.sum(
                    _weighted(exp_s, s, t), 0
                )
            if divergence_code == 2:
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
    if divergence_code != 0:
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


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    student,
    teacher,
    target,
    stats,
    upstream,
    out,
    num_tokens,
    columns,
    student_stride,
    teacher_stride,
    out_stride,
    scale,
    beta,
    divergence_code: tl.constexpr,
    with_entropy: tl.constexpr,
    with_logprob: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Write ``eager.block_gradient`` to out [N, columns]; stats [10, N]: ``GlobalStats``' fields, upstream [3, N]."""
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    inside = column < columns
    z_s = tl.load(student + row * student_stride + column, mask=inside, other=-infinity).to(tl.float32)
    log_p = (z_s - tl.load(stats + row)) * scale - tl.load(stats + num_tokens + row)
    p = tl.exp(log_p)
    none = log_p == -infinity
    gradient = tl.zeros_like(p)
    if divergence_code != 0:
        weight = tl.load(upstream + row)
        z_t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=-infinity).to(tl.float32)
        log_q = (z_t - tl.load(stats + 2 * num_tokens + row)) * scale - tl.load(stats + 3 * num_tokens + row)
        divergence = tl.where(weight == 0.0, 0.0, tl.load(stats + 4 * num_tokens + row))
        inner = tl.load(stats + 9 * num_tokens + row)
        if divergence_code == 1:
            gradient = weight * p * (tl.where(none, 0.0, tl.where(weight == 0.0, 0.0, log_p - log_q)) - divergence)
        if divergence_code == 2:
            gradient = weight * (p - tl.exp(log_q))
        if divergence_code == 3:
            minus_delta = tl.where(none, 0.0, log_q - log_p) + tl.log(beta)
            other = tl.log(1.0 - beta)
            larger = tl.maximum(minus_delta, other)
            u = -(1.0 - beta) * (larger + tl.log(tl.exp(minus_delta - larger) + tl.exp(other - larger)))
            gradient = weight * p * (tl.where(none, 0.0, u) - inner)
        if divergence_code == 4:
            delta = tl.where(z_t >= tl.load(stats + 8 * num_tokens + row), log_p - log_q, inner)
            gradient = weight * p * tl.where(none, 0.0, tl.where(weight == 0.0, 0.0, delta - divergence))
    if with_entropy:
        finite = tl.where(none, 0.0, log_p + tl.load(stats + 5 * num_tokens + row))
        gradient = gradient - tl.load(upstream + num_tokens + row) * p * finite
    if with_logprob:
        by_logprob = tl.load(upstream + 2 * num_tokens + row)
        gradient = gradient + tl.where(column == tl.load(target + row), by_logprob, 0.0) - by_logprob * p
    tl.store(out + row * out_stride + column, (gradient * scale).to(out.dtype.element_ty), mask=inside)
