"""AdamW whose moments lie in host memory, where it updates: bytes of the device for time.

It stands in the place of the optimizer inside Megatron's wrappers, which keep the fp32 weights on the device. Each step
copies gradients and weights to the host, and weights back: 12 bytes a parameter that this rank updates. Megatron's own
HybridDeviceOptimizer is for 16-bit weights alone, needs the distributed optimizer, and cannot run without CUDA.

Simplification: copies and updates do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_cord.parallel.fused_adam import update


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer's states return to host memory after torch has loaded them onto their parameters' device."""

    def to_host(loaded: torch.optim.Optimizer) -> None:
        for state in loaded.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to("cpu")

    optimizer.register_load_state_dict_post_hook(to_host)


class HostAdam(torch.optim.Optimizer):
    """AdamW with FusedAdam's contract: `step` in each param group, states `exp_avg` and `exp_avg_sq`.

    Args:
        groups: another AdamW's param groups, with their settings; they become this one's.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__([torch.empty(0)], {})
        self.param_groups = groups  # of the distributed optimizer's slices, which the constructor would refuse
        keep_on_host(self)

    def begin(self, parameter: Tensor) -> None:
        """Make the states of a parameter that has none yet. Not pinned: a checkpoint's child process reads them."""
        if not self.state[parameter]:
            names = ("exp_avg", "exp_avg_sq")
            self.state[parameter] = {name: torch.zeros_like(parameter, device="cpu") for name in names}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("HostAdam takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for parameter in params:
                self.begin(parameter)
            gradients, weights = [_to_host(p.grad) for p in params], [_to_host(p) for p in params]
            if params[0].is_cuda:
                torch.cuda.current_stream(params[0].device).synchronize()
            update(group, weights, gradients, [self.state[p] for p in params], fused=True)
            for parameter, weight in zip(params, weights, strict=True):
                if parameter.is_cuda:
                    parameter.copy_(weight, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it lies in host memory, else a pinned copy that is there once the stream is."""
    if not tensor.is_cuda:
        return tensor.detach()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
