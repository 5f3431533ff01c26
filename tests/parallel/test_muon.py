"""Muon against a float64 reference, torch's own Muon, and itself on several tensor-parallel ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.muon import Muon, orthogonalize
from tests.gloo import run_ranks

#: name → whole shape, the dimension that is split (−1: none), and rows of the parts of one head
MATRICES: dict[str, tuple[tuple[int, int], int, tuple[int, ...] | None]] = {
    "column": ((12, 5), 0, None),
    "row": ((6, 8), 1, None),
    "copy": ((4, 7), -1, None),
    "qkv": ((16, 6), 0, (4, 2, 2)),  # two heads of keys, four rows of queries to each
}
SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "dtype": torch.float32}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _, _) in MATRICES.items()}


def reference(steps: int, *, momentum: float = 0.95, lr: float = 0.1, weight_decay: float = 0.3) -> dict[str, Tensor]:
    """Return the weights after so many steps in float64, by singular values, each part cut out by its rows."""
    weights = {name: gradient.double() for name, gradient in gradients(-1).items()}
    buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(steps):
        for name, gradient in gradients(step).items():
            buffers[name] = momentum * buffers[name] + (1 - momentum) * gradient.double()
            update = momentum * buffers[name] + (1 - momentum) * gradient.double()
            weights[name] *= 1 - lr * weight_decay
            rows = torch.arange(update.shape[0])
            parts = [rows]
            if (sizes := MATRICES[name][2]) is not None:
                starts = [0, *itertools.accumulate(sizes)]
                inside = rows % sum(sizes)
                parts = [rows[(inside >= a) & (inside < b)] for a, b in itertools.pairwise(starts)]
            for part in parts:
                u, s, v = torch.linalg.svd(update[part], full_matrices=False)
                s = s / (s.square().sum().sqrt() + 1e-7)
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                weights[name][part] -= lr * 0.2 * math.sqrt(max(update[part].shape)) * (u * s) @ v
    return weights


def train(rank: int, world: int, steps: int) -> dict[str, Tensor]:
    """Train this rank's shards; return the whole matrices."""
    shards = {}
    for name, (_, dim, _) in MATRICES.items():
        whole = gradients(-1)[name]
        shards[name] = (whole if dim < 0 else whole.chunk(world, dim)[rank]).clone().requires_grad_()
        shards[name].partition_dim = dim  # type: ignore[attr-defined]
    group = dist.group.WORLD if world > 1 else None
    optimizer = Muon(shards.values(), group=group, **SETTINGS)
    optimizer.rows = {shards[name]: rows for name, (_, _, rows) in MATRICES.items() if rows is not None}
    for step in range(steps):
        for name, (_, dim, _) in MATRICES.items():
            whole = gradients(step)[name]
            shards[name].grad = (whole if dim < 0 else whole.chunk(world, dim)[rank]).clone()
        optimizer.step()
    return {name: shard.detach() for name, shard in shards.items()}


def train_rank(rank: int) -> dict[str, Tensor]:
    return train(rank, 2, 3)


def test_equals_the_reference_on_any_number_of_ranks() -> None:
    """Catches a wrong iteration, momentum, scale or decay, parts of fused matrices that mix, and shards that differ."""
    wanted = reference(3)
    alone, halves = train(0, 1, 3), run_ranks(train_rank, 2)
    for name, (_, dim, _) in MATRICES.items():
        got = halves[0][name] if dim < 0 else torch.cat([half[name] for half in halves], dim)
        torch.testing.assert_close(alone[name].double(), wanted[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.double(), wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torchs_muon(nesterov: bool) -> None:
    """Catches a rule that is not the published one; torch's iteration is in bfloat16."""
    ours, theirs = (torch.randn(24, 16, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    first = Muon([ours], lr=0.05, weight_decay=0.1, nesterov=nesterov)
    second = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in ((ours, first), (theirs, second)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-3)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_singular_values_come_near_one() -> None:
    """Catches an iteration that diverges, and a zero update that becomes NaN."""
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), 5))
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(3, 4), 5).any()
