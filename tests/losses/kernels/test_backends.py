"""All backends against float64: the statistics' and the gradient's every field, and the backends' names."""

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
from megatron_cord.losses.divergences import make_divergence
from megatron_cord.losses.implementations import inputs
from megatron_cord.losses.kernels import choice
from megatron_cord.losses.kernels.backend import Backend
from megatron_cord.losses.kernels.eager import EagerBackend
from megatron_cord.losses.shard import StoredLogits, VocabularyShard

ROOT = Path(__file__).parents[3]


def run_check(backend: str, device: str = "cpu", share: str = "all", **environment: str) -> None:
    """Compare in a process of its own: Triton and torch.compile read their switches once, when they are imported."""
    command = [sys.executable, "-m", "tests.losses.kernels.backend_check", backend, device, share]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("share", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_triton_kernels_in_the_interpreter(share: str) -> None:
    """Catches a kernel that differs from the formulas: a divergence, a temperature, a tile's end, −inf, a lost term."""
    pytest.importorskip("triton")
    run_check("triton", share=share, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiled_functions() -> None:
    """Catches a compiled function that differs from the eager one, and compilation that the process disables."""
    run_check("compile", TORCHDYNAMO_DISABLE="1")


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "topk", "forward_topk"])
def test_a_gradient_may_overwrite_its_logits(kind: str) -> None:
    """Catches a gradient that reads logits which it has already written over."""
    student, teacher = torch.randn(2, 300, 200, generator=torch.Generator().manual_seed(0)).unbind(0)
    rule, backend, target = make_divergence(kind, beta=0.3, k=5), EagerBackend(), torch.arange(300) % 200
    shard = VocabularyShard(rule, 0.7, 0, 200, torch.float32, None, backend)
    stats = shard.stats(StoredLogits(student, teacher), target)
    divergence, entropy, logprob = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).unbind(0)
    outcomes = torch.empty_like(student), student.clone()
    for out, logits in ((outcomes[0], student), (outcomes[1], outcomes[1])):
        backend.gradient(logits, teacher, target, stats, rule, 0.7, (divergence, entropy, logprob), out)
    assert torch.equal(*outcomes)


def test_backends_that_cannot_run_are_named() -> None:
    """Catches a backend that is silently another one."""
    logits, target = torch.zeros(1, 4), torch.tensor([0])
    with pytest.raises(CordError, match="backend 'cuda' is unknown; choose one of auto, eager, compile, triton"):
        divergence_from_logits(logits, logits, target, backend="cuda")
    with pytest.raises(CordError, match="backend triton needs"):
        divergence_from_logits(logits, logits, target, backend="triton")
    assert math.isclose(
        float(divergence_from_logits(logits, logits, target, backend="auto").entropy), math.log(4), rel_tol=1e-6
    )


def test_auto_takes_float64_to_a_backend_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches auto on CUDA that chooses triton for float64, which triton refuses, and one that never chooses it."""
    chosen, cuda = object(), torch.device("cuda")
    monkeypatch.setattr(choice, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(choice, "_triton", lambda: chosen)
    assert choice.choose_backend("auto", cuda, 1, torch.float32) is chosen
    assert isinstance(choice.choose_backend("auto", cuda, 1, torch.float64), EagerBackend)
    asked: list[torch.dtype] = []

    def choose(name: str, device: torch.device, elements: int, dtype: torch.dtype) -> Backend:
        asked.append(dtype)
        return choice.choose_backend(name, device, elements, dtype)

    monkeypatch.setattr(inputs, "choose_backend", choose)
    for dtype in (torch.bfloat16, torch.float64):
        logits = torch.zeros(1, 4, dtype=dtype)
        divergence_from_logits(logits, logits, torch.tensor([0]))
    assert asked == [torch.float32, torch.float64]
