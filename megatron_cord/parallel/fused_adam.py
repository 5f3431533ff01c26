"""AdamW with the contract that Megatron's distributed optimizer expects of apex's and transformer-engine's FusedAdam.

The contract: one ``step`` in each param group instead of one in each parameter's state, and states named ``exp_avg``
and ``exp_avg_sq``. Simplification: decoupled weight decay (AdamW) only; torch's fused kernel on a CPU, elsewhere one
foreach kernel a group. It is used where neither apex nor transformer-engine is present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) over param groups.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        adam_w_mode: must be True; callers of FusedAdam pass it.
        capturable: must be False, as nothing here goes into a CUDA graph; Megatron-Core 0.19 passes it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError(
                "this FusedAdam implements decoupled weight decay only (adam_w_mode=True), "
                "and no CUDA graphs (capturable=False)"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if not params:
                continue
            gradients = [p.grad for p in params if p.grad is not None]
            on_cpu = params[0].device.type == "cpu"  # where foreach passes over the memory for each operation
            states = [self.state[p] for p in params]
            update(group, params, gradients, states, foreach=not on_cpu, fused=on_cpu)


def update(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> None:
    """Update weights in place by AdamW, with the settings and the step of a param group.

    Args:
        group: `step` counts this update.
        weights: one tensor a parameter.
        gradients: likewise.
        states: their `exp_avg` and `exp_avg_sq`, updated in place.
        foreach: one kernel of torch's for all tensors.
        fused: one kernel for all steps of a tensor's update.
    """
    beta1, beta2 = group["betas"]
    adamw(
        list(weights),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        # torch counts the step before it uses it, so each call gets a fresh count of the steps already made.
        [torch.tensor(float(group["step"] - 1)) for _ in weights],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        foreach=foreach,
        fused=fused,
    )
