"""The backend of Triton kernels, and the gradient's: each reads its logits once and keeps the rest in registers.

A program of the statistics kernel (``triton_statistics``) has one token, one of the gradient kernel a tile of a token's
columns. The second pass of the two-pass divergences stays eager torch. float64 inputs are refused. On a CPU the kernels
run in Triton's interpreter (TRITON_INTERPRET=1), which is slow and for tests; for a GPU that is not there
``tools/aot_kernels.py`` compiles them.

Shapes: N tokens; a block is [N, columns], its rows contiguous or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.divergences import (
    Divergence,
    ForwardKL,
    ForwardTopK,
    JensenShannon,
    NoTeacher,
    ReverseKL,
    TopK,
)
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.kernels.eager import EagerBackend
from megatron_cord.losses.kernels.triton_statistics import statistics_kernel
from megatron_cord.losses.statistics import GlobalStats, PartialStats

#: Columns that a program works on at a time, its warps, their threads, and the bytes that a thread loads at once.
TILE_COLUMNS = 4096
WARPS = 8
LANES = 32 * WARPS
LOAD_BYTES = 16

#: The divergences by number, for the kernels.
CODES: dict[type, int] = {NoTeacher: 0, ReverseKL: 1, ForwardKL: 2, JensenShannon: 3, TopK: 4, ForwardTopK: 5}


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
            width = _load_width(student, teacher)
            lanes = min(LANES, TILE_COLUMNS // width)
            statistics_kernel[(num_tokens,)](
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
                repeats=TILE_COLUMNS // (lanes * width),
                lanes=lanes,
                width=width,
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
        target_out = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
        beta = divergence.beta if isinstance(divergence, JensenShannon) else 0.5
        _gradient_kernel[(num_tokens, triton.cdiv(columns, TILE_COLUMNS))](
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
            tile_columns=TILE_COLUMNS,
            num_warps=WARPS,
        )
        if target_out is not out:
            out.copy_(target_out)


def _rows_together(block: Tensor) -> Tensor:
    return block if block.stride(1) == 1 else block.contiguous()


def _load_width(*blocks: Tensor) -> int:
    """Return how many columns a thread loads at once: 1 where rows do not begin where Triton loads several.

    Triton takes for granted no more than that a stride is a multiple of 16; else one thread's columns would be spread
    over several.
    """
    if any(block.data_ptr() % LOAD_BYTES or block.stride(0) % 16 for block in blocks):
        return 1
    return LOAD_BYTES // max(block.element_size() for block in blocks)


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
            smaller = tl.exp(-tl.abs(minus_delta - other))
            u = -(1.0 - beta) * (tl.maximum(minus_delta, other) + tl.log(1.0 + smaller))
            gradient = weight * p * (tl.where(none, 0.0, u) - inner)
        if divergence_code == 4:
            delta = tl.where(z_t >= tl.load(stats + 8 * num_tokens + row), log_p - log_q, inner)
            gradient = weight * p * tl.where(none, 0.0, tl.where(weight == 0.0, 0.0, delta - divergence))
        if divergence_code == 5:
            in_top = z_t >= tl.load(stats + 8 * num_tokens + row)
            gradient = weight * tl.where(in_top, p - tl.exp(log_q), p * inner)
    if with_entropy:
        finite = tl.where(none, 0.0, log_p + tl.load(stats + 5 * num_tokens + row))
        gradient = gradient - tl.load(upstream + num_tokens + row) * p * finite
    if with_logprob:
        by_logprob = tl.load(upstream + 2 * num_tokens + row)
        gradient = gradient + tl.where(column == tl.load(target + row), by_logprob, 0.0) - by_logprob * p
    tl.store(out + row * out_stride + column, (gradient * scale).to(out.dtype.element_ty), mask=inside)
