"""Muon for matrices that are split over tensor-parallel ranks.

Megatron-Core's own Muon needs the package emerging-optimizers, whose release 0.3.0 asks for Python 3.12 and does not
fit Megatron-Core 0.16.1; torch's knows whole matrices only. So the update is written here, against a group that may
have one member. States are named as in both of them, `momentum_buffer`. Sources: K. Jordan et al. 2024 (momentum, and
Newton-Schulz with these coefficients); arXiv 2502.16982 (decay, and the scale at which AdamW's rates carry over).

Simplification: every tensor-parallel rank gathers the matrix and computes all of its update, the same as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.host_adam import keep_on_host

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TINY = 1e-7  # added to the norm of an update, so that a zero stays one


def orthogonalize(update: Tensor, iterations: int) -> Tensor:
    """Return U Vᵀ of [m, n] = U S Vᵀ, roughly: the singular values come to lie around 1, by a polynomial of odd powers.

    The iteration multiplies matrices of the shorter side only. Its values do not depend on the order of the rows.

    Args:
        update: [m, n], whose type the products have.
        iterations: of Newton-Schulz.
    """
    a, b, c = _COEFFICIENTS
    x = update.mT if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + _TINY)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if update.shape[0] > update.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; for matrices alone.

    A tensor says by Megatron's attribute `partition_dim` along which dimension it is split.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: share of the momentum that a step keeps.
        nesterov: look a step ahead, by mixing the gradient in once more.
        iterations: of Newton-Schulz.
        scale: of the update, times √(longer side).
        dtype: of the iteration.
        offload: keep the momentum in host memory, and copy it to the device and back for the update.
        group: the tensor-parallel ranks; None means one.

    Attributes:
        rows: of fused matrices: how many rows of each of their parts follow on one another, such as query, key and
            value of one head. Each part is orthogonalized by itself, over all heads.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        scale: float = 0.2,
        dtype: torch.dtype = torch.bfloat16,
        offload: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.nesterov, self.scale = momentum, nesterov, scale
        self.iterations, self.dtype, self.group = iterations, dtype, group
        self.offload = offload
        self.rows: dict[Tensor, Sequence[int]] = {}
        if offload:
            keep_on_host(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the group."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # not used here, but Megatron compares the counts of all groups
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        self.begin(parameter)
        kept = self.state[parameter]["momentum_buffer"]
        momentum = kept.to(gradient.device).lerp_(gradient, 1 - self.momentum)
        if self.offload:
            kept.copy_(momentum)
        update = gradient.lerp(momentum, self.momentum) if self.nesterov else momentum
        dim = getattr(parameter, "partition_dim", -1)
        rows = self.rows.get(parameter, (parameter.shape[0],))
        blocks = update.unflatten(0, (-1, sum(rows))).split(list(rows), dim=1)  # of each part: [heads, rows, columns]
        parts = [self._orthogonalize(part.flatten(0, 1), dim).view_as(part) for part in blocks]
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(torch.cat(parts, dim=1).view_as(parameter), alpha=-lr)

    def begin(self, parameter: Tensor) -> None:
        """Make the state of a parameter that has none yet."""
        if not self.state[parameter]:
            device = torch.device("cpu") if self.offload else parameter.device
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, device=device)}

    def _orthogonalize(self, shard: Tensor, dim: int) -> Tensor:
        """Return this rank's part of the scaled update of the matrix whose shard is given, in the shard's type."""
        whole = shard.to(self.dtype)
        size = 1 if self.group is None or dim < 0 else self.group.size()
        if size > 1:
            shards = [torch.empty_like(whole, memory_format=torch.contiguous_format) for _ in range(size)]
            dist.all_gather(shards, whole.contiguous(), group=self.group)
            whole = torch.cat(shards, dim)
        done = orthogonalize(whole, self.iterations) * (self.scale * math.sqrt(max(whole.shape)))
        if size > 1:
            done = done.chunk(size, dim)[dist.get_rank(self.group)]
        return done.to(shard.dtype)
