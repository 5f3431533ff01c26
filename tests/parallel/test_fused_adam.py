"""FusedAdam against torch's AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cord.parallel.fused_adam import FusedAdam

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}


def parameters() -> list[Tensor]:
    """Return parameters of which the last never has a gradient, and the one before it has no elements."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((3, 4), (5,), (0,), (2,))]


def groups(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """With and without weight decay."""
    return [{"params": tensors[:1], "weight_decay": 0.3}, {"params": tensors[1:], "weight_decay": 0.0, "lr": 0.02}]


def give_gradients(tensors: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors[:-1]:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def test_equals_adamw() -> None:
    """Catches a wrong bias correction, coupled weight decay, and settings of a group that are ignored or go stale."""
    fused, plain = parameters(), parameters()
    optimizer, reference = FusedAdam(groups(fused), **SETTINGS), torch.optim.AdamW(groups(plain), **SETTINGS)
    for step in range(6):
        for each, tensors in ((optimizer, fused), (reference, plain)):
            give_gradients(tensors, step)
            each.param_groups[0]["lr"] = 0.1 / (step + 1)
            each.step()
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)


def test_continues_from_its_state() -> None:
    """Catches moments or the count of steps that a checkpoint loses."""
    straight, stopped = parameters(), parameters()
    optimizer, first = FusedAdam(groups(straight), **SETTINGS), FusedAdam(groups(stopped), **SETTINGS)
    for step in range(6):
        if step == 3:
            second = FusedAdam(groups(stopped), lr=1.0)
            second.load_state_dict(first.state_dict())
            first = second
        for each, tensors in ((optimizer, straight), (first, stopped)):
            give_gradients(tensors, step)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_contract_of_fused_optimizers() -> None:
    """Catches a state that Megatron's distributed optimizer does not find where it looks."""
    tensors = parameters()
    optimizer = FusedAdam(groups(tensors), **SETTINGS)
    give_gradients(tensors, 0)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_what_it_does_not_do() -> None:
    """Catches settings that are silently ignored."""
    with pytest.raises(ValueError, match="decoupled weight decay only"):
        FusedAdam(parameters(), adam_w_mode=False)
    with pytest.raises(ValueError, match="takes no closure"):
        FusedAdam(parameters()).step(lambda: 0.0)
