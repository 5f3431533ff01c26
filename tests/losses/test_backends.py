"""All backends against eager torch: the statistics' and the gradient's every field, and the backends' names."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.losses import divergence_from_logits

ROOT = Path(__file__).parents[2]


def run_check(backend: str, **environment: str) -> None:
    """Compares in a process of its own: Triton and torch.compile read their switches once, when they are first imported."""
    command = [sys.executable, "-m", "tests.losses.backend_check", backend]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_triton_kernels_in_the_interpreter() -> None:
    """Catches a kernel that differs from the formulas: another kind, temperature, tile border, −inf, mixed types, a term left out."""
    pytest.importorskip("triton")
    run_check("triton", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiled_functions() -> None:
    """Catches a compiled function that differs from the eager one, and compilation that stays off where the process has disabled it."""
    run_check("compile", TORCHDYNAMO_DISABLE="1")


def test_backends_that_cannot_run_are_named() -> None:
    """Catches a backend that is silently another one."""
    logits, target = torch.zeros(1, 4), torch.tensor([0])
    with pytest.raises(CordError, match="backend 'cuda' is unknown; choose one of auto, eager, compile, triton"):
        divergence_from_logits(logits, logits, target, backend="cuda")
    with pytest.raises(CordError, match="backend triton needs"):
        divergence_from_logits(logits, logits, target, backend="triton")
    assert math.isclose(float(divergence_from_logits(logits, logits, target, backend="auto").entropy), math.log(4), rel_tol=1e-6)
