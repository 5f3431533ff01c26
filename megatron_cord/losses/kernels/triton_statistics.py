"""The statistics of a block of logits as a Triton kernel: one sweep, no exchange between threads until its end.

One program has one token. Each of its threads (a lane) keeps the statistics of the columns that it has seen, relative
to their own maxima; the lanes are merged once, as ``merge_stats`` merges blocks. The sweep has neither masks nor
guards: the last, incomplete tile comes after it, and a row whose sums are not finite, as an infinite logit leaves them,
is summed up again with guards.

Shapes: N tokens; a block is [N, columns]; a tile is [repeats, lanes, width], of which a lane loads ``width`` columns at
    once. m: maxima; l: Σ e^{s−m}; b: Σ e^{s−m} (s−m); a: the divergence's sum. Differences of logits are divided by the
    temperature at the end, for e^x is 2^{x log₂ e} anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
#: Of the divergences by number (``triton_kernels.CODES``), those that a single pass distinguishes.
NO_TEACHER = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
FORWARD_KL = tl.constexpr(2)


@triton.jit
def safe(maximum):  # type: ignore[no-untyped-def]
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


@triton.jit
def _shifts(old, new, scale2):  # type: ignore[no-untyped-def]
    """Return old − new, 0 where there was no mass, and e^{(old − new)/τ}."""
    shift = tl.where(old == float("-inf"), 0.0, old - safe(new))
    return shift, tl.exp2(shift * scale2)


@triton.jit
def _lane_sum(tile):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _exponentials(z, maximum, inside, scale2, masked: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return z − maximum and e^{(z − maximum)/τ}, both 0 where a tile ends before its last column."""
    if masked:
        difference = tl.where(inside, z - safe(maximum)[None, :, None], 0.0)
        exponential = tl.where(inside, tl.exp2(difference * scale2), 0.0)
    else:
        difference = z - maximum[None, :, None]
        exponential = tl.exp2(difference * scale2)
    return difference, exponential


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(  # type: ignore[no-untyped-def]
    student, teacher, column, columns, m_s, l_s, b, a, m_t, l_t, scale2, code: tl.constexpr, masked: tl.constexpr
):
    """Return the lanes' statistics with one more tile."""
    inside = column < columns
    if masked:
        z_s = tl.load(student + column, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        z_s = tl.load(student + column).to(tl.float32)
    new_s = tl.maximum(m_s, tl.max(tl.max(z_s, 2), 0))
    shift_s, factor_s = _shifts(m_s, new_s, scale2)
    d_s, exp_s = _exponentials(z_s, new_s, inside, scale2, masked)
    if code != NO_TEACHER:
        if masked:
            z_t = tl.load(teacher + column, mask=inside, other=float("-inf")).to(tl.float32)
        else:
            z_t = tl.load(teacher + column).to(tl.float32)
        new_t = tl.maximum(m_t, tl.max(tl.max(z_t, 2), 0))
        shift_t, factor_t = _shifts(m_t, new_t, scale2)
        d_t, exp_t = _exponentials(z_t, new_t, inside, scale2, masked)
        if code == REVERSE_KL:
            a = factor_s * (a + l_s * (shift_s - shift_t)) + _lane_sum(exp_s * (d_s - d_t))
        if code == FORWARD_KL:
            a = factor_t * (a + l_t * (shift_t - shift_s)) + _lane_sum(exp_t * (d_t - d_s))
        l_t = factor_t * l_t + _lane_sum(exp_t)
        m_t = new_t
    b = factor_s * (b + l_s * shift_s) + _lane_sum(exp_s * d_s)
    l_s = factor_s * l_s + _lane_sum(exp_s)
    return new_s, l_s, b, a, m_t, l_t


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    student,
    teacher,
    columns,
    scale,
    code: tl.constexpr,
    repeats: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
):
    """Return a row's statistics; not all are finite where a logit is not."""
    m_s = tl.full([lanes], float("-inf"), tl.float32)
    l_s = tl.zeros([lanes], tl.float32)
    b, a, m_t, l_t = l_s, l_s, m_s, l_s
    scale2 = scale * LOG2_E
    repeat = tl.arange(0, repeats)[:, None, None] * (lanes * width)
    offsets = repeat + tl.arange(0, lanes)[None, :, None] * width + tl.arange(0, width)[None, None, :]
    whole = columns // (repeats * lanes * width) * (repeats * lanes * width)
    for first in range(0, whole, repeats * lanes * width):
        m_s, l_s, b, a, m_t, l_t = _add_tile(
            student, teacher, first + offsets, columns, m_s, l_s, b, a, m_t, l_t, scale2, code, False
        )
    if whole < columns:
        m_s, l_s, b, a, m_t, l_t = _add_tile(
            student, teacher, whole + offsets, columns, m_s, l_s, b, a, m_t, l_t, scale2, code, True
        )
    row_m_s, row_m_t = tl.max(m_s, 0), tl.max(m_t, 0)
    shift_s, factor_s = _shifts(m_s, row_m_s, scale2)
    shift_t, factor_t = _shifts(m_t, row_m_t, scale2)
    if code == REVERSE_KL:
        a = factor_s * (a + l_s * (shift_s - shift_t))
    if code == FORWARD_KL:
        a = factor_t * (a + l_t * (shift_t - shift_s))
    b = factor_s * (b + l_s * shift_s)
    row_l_s, row_l_t = tl.sum(factor_s * l_s, 0), tl.sum(factor_t * l_t, 0)
    return row_m_s, row_l_s, tl.sum(b, 0) * scale, tl.sum(a, 0) * scale, row_m_t, row_l_t


@triton.jit  # type: ignore[untyped-decorator]
def _guarded_sweep(  # type: ignore[no-untyped-def]
    student, teacher, columns, scale, code: tl.constexpr, tile: tl.constexpr
):
    """Return a row's statistics, whatever its logits."""
    infinity = float("inf")
    m_s, m_t = -infinity, -infinity
    l_s, l_t, b, a = 0.0, 0.0, 0.0, 0.0
    scale2 = scale * LOG2_E
    for first in range(0, columns, tile):
        column = first + tl.arange(0, tile)
        inside = column < columns
        z_s = tl.load(student + column, mask=inside, other=-infinity).to(tl.float32)
        new_s = tl.maximum(m_s, tl.max(z_s, 0))
        shift_s, factor_s = _shifts(m_s, new_s, scale2)
        s = z_s - safe(new_s)
        exp_s = tl.exp2(s * scale2)
        if code != NO_TEACHER:
            z_t = tl.load(teacher + column, mask=inside, other=-infinity).to(tl.float32)
            new_t = tl.maximum(m_t, tl.max(z_t, 0))
            shift_t, factor_t = _shifts(m_t, new_t, scale2)
            t = z_t - safe(new_t)
            exp_t = tl.exp2(t * scale2)
            if code == REVERSE_KL:
                merged = tl.where(a == infinity, infinity, factor_s * (a + l_s * (shift_s - shift_t)))
                a = merged + tl.sum(_weighted(exp_s, s, t), 0)
            if code == FORWARD_KL:
                merged = tl.where(a == infinity, infinity, factor_t * (a + l_t * (shift_t - shift_s)))
                a = merged + tl.sum(_weighted(exp_t, t, s), 0)
            l_t = factor_t * l_t + tl.sum(exp_t, 0)
            m_t = new_t
        b = factor_s * (b + l_s * shift_s) + tl.sum(exp_s * tl.where(s == -infinity, 0.0, s), 0)
        l_s = factor_s * l_s + tl.sum(exp_s, 0)
        m_s = new_s
    return m_s, l_s, b * scale, a * scale, m_t, l_t


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(  # type: ignore[no-untyped-def]
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
    repeats: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
):
    """Write the fields of ``PartialStats`` to out [8, N]; ``scale`` is 1/τ, the tile [repeats, lanes, width]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    m_s, l_s, b, a, m_t, l_t = _sweep(student, teacher, columns, scale, divergence_code, repeats, lanes, width)
    if not tl.abs(l_s + b + a + l_t) < float("inf"):
        m_s, l_s, b, a, m_t, l_t = _guarded_sweep(student, teacher, columns, scale, divergence_code, lanes * width)
    chosen = tl.load(target + row)
    held = (chosen >= 0) & (chosen < columns)
    y_s = tl.load(student + chosen, mask=held, other=float("-inf")).to(tl.float32)
    y_t = y_s
    if divergence_code != NO_TEACHER:
        y_t = tl.load(teacher + chosen, mask=held, other=float("-inf")).to(tl.float32)
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
