"""Matrix products of low-precision inputs with fp32 results: the one place that chooses how a device forms them best.

Logits rounded to bfloat16 spoil small divergences, so ``product`` never rounds below fp32. There are three methods:

- *native*, on CUDA: the GEMM itself writes its fp32 sums.
- *brgemm* (``cpu_matmul``), bfloat16 on a CPU that multiplies it in hardware: the same, where there is a C++ compiler
  to reach it.
- *upcast*, anywhere else: operands become fp32, a block at a time. On a CPU without bfloat16 in hardware its products
  are slower than fp32's.

``add_product`` is for gradients, whose operands may be rounded: every sum over many rounded terms averages the rounding
out.

Shapes: C tokens, K columns, H hidden.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_cord.losses.kernels.cpu_matmul import bfloat16_product

LOW_PRECISION = (torch.bfloat16, torch.float16)

#: Names of processors' units that multiply bfloat16: x86's two, and ARM's.
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return left · rightᵀ in ``dtype``, [C, K]; the operands are of one type, at most as precise.

    Args:
        left: [C, H].
        right: [K, H].
        dtype: of the result.
        out: [C, K] of ``dtype``, written to and returned; None: a new tensor.
    """
    out = torch.empty(len(left), len(right), dtype=dtype, device=left.device) if out is None else out
    if left.dtype == dtype:
        return torch.mm(left, right.T, out=out)
    if left.dtype in LOW_PRECISION and dtype == torch.float32:
        if left.is_cuda:
            return torch.mm(left, right.T, out_dtype=torch.float32, out=out)
        if (
            left.dtype == torch.bfloat16
            and multiplies_bfloat16()
            and left.shape[1] % 2 == 0
            and (brgemm := bfloat16_product())
        ):
            return brgemm(left.contiguous(), right.contiguous(), out)
    return torch.mm(left.to(dtype), right.to(dtype).T, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to ``total``, in its type.

    Args:
        total: the sum.
        left: a gradient of logits, or its transpose.
        right: hidden states or weights.
    """
    dtype = operand_dtype(left.dtype, left.device)
    left, right = left.to(dtype), right.to(dtype)
    if dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left · right to ``out``, summed in fp32 at least and rounded once; operands as in ``add_product``."""
    dtype = operand_dtype(left.dtype, left.device)
    left, right = left.to(dtype), right.to(dtype)
    if dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and dtype in LOW_PRECISION:
        out.copy_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        out.copy_(left @ right)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which such operands are multiplied on the device when their rounding does not matter."""
    if dtype in LOW_PRECISION and device.type == "cpu" and not (dtype == torch.bfloat16 and multiplies_bfloat16()):
        return torch.float32
    return dtype


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in BFLOAT16_UNITS)
