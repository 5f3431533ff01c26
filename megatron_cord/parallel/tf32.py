"""TF32: what CUDA may compute float32 operations in. Training leaves torch's defaults; checks do without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Let CUDA compute in float32 without TF32, whose 10 bits of mantissa are torch's default in convolutions."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def tf32_in_use() -> str:
    """Say which float32 operations of this process use TF32 where there is CUDA."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return f"convolutions {'TF32' if convolutions else 'float32'}, matrix products {'TF32' if products else 'float32'}"
