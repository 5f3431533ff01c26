"""Updates of one stage: AdamW in fp32 on every rank, with gradients summed over all ranks.

Losses are divided by counts of the whole batch, so a gradient does not depend on how the batch is divided. Modules of a
few million parameters are trained here, so every rank has all of the moments, and one collective carries everything:
gradients, loss, and whether a rank was asked to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule
from megatron_cord.warmup.config import WarmupConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class StageConfig(Protocol):
    """What the stages' configurations have in common."""

    @property
    def steps(self) -> int:
        """Updates."""
        ...

    @property
    def batch_size(self) -> int:
        """Recordings an update."""
        ...

    @property
    def learning_rate(self) -> float:
        """The peak."""
        ...

    @property
    def final_learning_rate_fraction(self) -> float:
        """Of the peak."""
        ...


class Updates:
    """The optimizer of one stage.

    Args:
        name: of the stage, for errors.
        module: what it trains; equal on all ranks.
        stage: its rates.
        config: what all stages share.
        layout: the ranks.
        peaks: of parameters with a rate of their own, by what their names begin with; the others have the stage's.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        stage: StageConfig,
        config: WarmupConfig,
        layout: Layout,
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        self._name, self._layout, self._clip_norm = name, layout, config.clip_norm
        self._parameters = dict(module.named_parameters())
        peak = stage.learning_rate
        warmup = min(config.warmup_steps, stage.steps - 1)
        self._rates = RateSchedule(peak, peak * stage.final_learning_rate_fraction, warmup, stage.steps)
        prefixes = {"": peak, **(peaks or {})}  # of several that fit, the last counts
        groups: dict[float, list[nn.Parameter]] = {}
        for each, parameter in self._parameters.items():
            own = [rate for prefix, rate in prefixes.items() if each.startswith(prefix)][-1]
            groups.setdefault(own / peak, []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
            lr=peak,
            weight_decay=config.weight_decay,
        )

    def update(self, step: int, losses: Iterable[Tensor], *, stop: bool) -> tuple[float, bool]:
        """Make an update. Collective over all ranks.

        Args:
            step: counted from 0.
            losses: this rank's summands of the batch's loss; each has its backward pass before the next is asked for.
            stop: whether this rank was asked to stop.

        Returns:
            the loss of the whole batch, and whether any rank was asked to stop.

        Raises:
            CordError: the loss is not finite; nothing is changed then.
        """
        self._optimizer.zero_grad()
        parameters = list(self._parameters.values())
        loss = parameters[0].new_zeros(())
        for each in losses:
            each.backward()  # type: ignore[no-untyped-call]
            loss += each.detach()
        flat = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in parameters]
        shared = torch.cat([*flat, loss.view(1), loss.new_tensor([float(stop)])])
        dist.all_reduce(shared)
        total, stops = shared[-2:].tolist()
        if not bool(torch.isfinite(shared.sum())):
            raise CordError(
                f"{self._name}: the loss or its gradient is not finite at step {step + 1}; lower "
                f"{self._name}.learning_rate, or set dtype=float32"
            )
        for parameter, grad in zip(parameters, torch.split(shared[:-2], [len(each) for each in flat]), strict=True):
            parameter.grad = grad.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = group["factor"] * self._rates.rate(step)
        self._optimizer.step()
        return total, stops > 0

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by parameter and moment; empty before the first update."""
        states = ((name, self._optimizer.state.get(each, {})) for name, each in self._parameters.items())
        return {f"{name}/{moment}": state[moment] for name, state in states for moment in _MOMENTS if state}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from what `moments` returned."""
        for name, parameter in self._parameters.items():
            state = {moment: moments[f"{name}/{moment}"] for moment in _MOMENTS if moments}
            # AdamW counts its steps on the host.
            self._optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device) for moment, value in state.items()
            }
