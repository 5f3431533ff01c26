"""The formulas of ``eager`` fused by torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megatron_cord.losses.kernels.eager import EagerBackend


@cache
def compiled_backend() -> EagerBackend:
    """Return the compiled backend of this process; the first calls compile."""
    return EagerBackend(_compile, tile=2**24)  # fused steps need no small tiles, and calls cost time


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one function, also where the process has switched compilation off for everything else."""
    disabled = os.environ.pop("TORCHDYNAMO_DISABLE", None)
    try:
        return torch.compile(function, dynamic=True)
    finally:
        if disabled is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = disabled
