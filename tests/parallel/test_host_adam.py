"""HostAdam against torch's AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cord.parallel.host_adam import HostAdam

SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-3}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((3, 4), (5,), (0,), (2,))]


def host_adam(tensors: list[Tensor]) -> HostAdam:
    """Two groups, as Megatron makes them: with and without weight decay."""
    first = {"params": tensors[:1], "lr": 0.1, "weight_decay": 0.3}
    return HostAdam([first | SETTINGS, {"params": tensors[1:], "lr": 0.02, "weight_decay": 0.0} | SETTINGS])


def give_gradients(tensors: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors[:-1]:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def test_equals_adamw_also_after_a_checkpoint() -> None:
    """Catches a wrong correction, settings of a group that are ignored, and moments or a count that are lost."""
    ours, plain = parameters(), parameters()
    optimizer, reference = host_adam(ours), torch.optim.AdamW(host_adam(plain).param_groups)
    for step in range(6):
        if step == 3:
            again = host_adam(ours)
            for parameter in ours:
                again.begin(parameter)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        for each, tensors in ((optimizer, ours), (reference, plain)):
            give_gradients(tensors, step)
            each.param_groups[0]["lr"] = 0.1 / (step + 1)
            each.step()
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert [group["step"] for group in optimizer.param_groups] == [6, 6]
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
