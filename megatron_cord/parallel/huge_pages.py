"""Memory in huge pages, for large tensors that are written once and read once or twice."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

#: A huge page of Linux: 2 MiB on x86 and most ARM.
HUGE_PAGE = 2**21


def empty_in_huge_pages(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor; on CPUs it lies in huge pages where Linux has them on demand.

    The first write to new memory takes longer than computing what is written, a fault for every 4 KiB of it: for a
    gradient of logits two thirds of the backward pass.
    """
    memory = torch.empty(*shape, dtype=dtype, device=device)
    if memory.device.type == "cpu" and memory.nbytes >= 2 * HUGE_PAGE and (advise := _madvise()):
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)  # a refusal leaves small pages
    return memory


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None
