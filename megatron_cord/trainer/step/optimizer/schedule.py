"""Learning rates by step: a linear warm-up, and what the schedule's kind makes of the steps behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_cord.config.curves import Shape, remaining
from megatron_cord.errors import CordError
from megatron_cord.trainer.step.optimizer.config import DECAY_SHARE, OptimizerConfig


@dataclass(frozen=True)
class RateSchedule:
    """The learning rates of a run. Checkpoints keep the fields; those of earlier revisions have the first four.

    Attributes:
        peak: at the end of the warm-up.
        final: approached, and reached after the last step, as Megatron does.
        warmup: steps of the warm-up.
        steps: of the whole schedule.
        decay: the last steps, over which the rate falls, the first of them at the full rate; null: all behind the
            warm-up, and 0: none.
        shape: how it falls.
        factors: of groups of parameters: their rates as a multiple of these.
    """

    peak: float
    final: float
    warmup: int
    steps: int
    decay: int | None = None
    shape: Shape = "cosine"
    factors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: OptimizerConfig, steps: int) -> RateSchedule:
        """Return the schedule of a configuration, over so many steps.

        Raises:
            CordError: the run is too short for its warm-up and its decay, or its decay for a rate below the peak.
        """
        rate, warmup = config.learning_rate, min(config.warmup_steps, steps - 1)
        final = rate * config.final_learning_rate_fraction
        factors = {name: (group.learning_rate or rate) / rate for name, group in config.groups.items()}
        if config.schedule == "constant":
            return cls(rate, rate, warmup, steps, 0, factors=factors)
        if config.schedule == "wsd":
            decay = config.decay_steps or _share_of(steps, config.decay_share)
            if config.warmup_steps + decay > steps:
                raise CordError(
                    f"optimizer.warmup_steps={config.warmup_steps} and a decay of {decay} steps do not fit into "
                    f"train.steps={steps}; lower optimizer.decay_steps, or give optimizer.decay_share in its place"
                )
            return cls(rate, final, warmup, steps, decay, config.decay_shape or "linear", factors)
        return cls(rate, final, warmup, steps, shape=config.schedule, factors=factors)

    @property
    def initial(self) -> float:
        """The rate of the first step: not zero, which would waste it."""
        return self.peak / (self.warmup + 1)

    def rate(self, step: int, group: str | None = None) -> float:
        """Return the learning rate of the update after so many steps; that of a group by its name."""
        return self._rate(step) * self.factors.get(group or "", 1.0)

    def _rate(self, step: int) -> float:
        if self.warmup and step <= self.warmup:
            return self.initial + (self.peak - self.initial) * step / self.warmup
        decay = self.steps - self.warmup if self.decay is None else self.decay
        if not decay:
            return self.peak
        share = (step - self.steps + decay) / decay
        return self.final + (self.peak - self.final) * remaining(self.shape, min(1.0, max(0.0, share)))


def _share_of(steps: int, share: float | None) -> int:
    """Return the steps of a decay over a share of a run; of two at least, as the first has the full rate."""
    if share is None:
        return min(steps, max(2, round(steps * DECAY_SHARE)))
    if (decay := round(steps * share)) < 2:
        raise CordError(
            f"optimizer.decay_share={share} of train.steps={steps} is a decay of {decay} steps, and it takes 2: the "
            "first has the full rate; raise optimizer.decay_share, or take optimizer.schedule=constant"
        )
    return decay


class HasParamGroups(Protocol):
    """An optimizer, whatever is wrapped around it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters with their settings."""


class RateScheduler:
    """Gives the optimizer its learning rates, step by step.

    In a group of the optimizer, `lr_mult` multiplies the schedule's rate, and `wd_mult` multiplies `weight_decay`.

    Args:
        optimizer: its groups are changed.
        schedule: the rates.
        weight_decay: of a group whose `wd_mult` is 1.
    """

    def __init__(self, optimizer: HasParamGroups, schedule: RateSchedule, weight_decay: float) -> None:
        self.optimizer, self.schedule, self.weight_decay = optimizer, schedule, weight_decay
        self.num_steps = 0
        self.step(0)

    def step(self, increment: int) -> None:
        """Set the rates of the update that comes after so many more steps."""
        self.num_steps += increment
        rate = self.schedule.rate(self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
            group["weight_decay"] = self.weight_decay * group["wd_mult"]

    def rates(self) -> dict[str, float]:
        """Return the rates of the next update by the names of their metrics."""
        rates = {"learning_rate": self.schedule.rate(self.num_steps)}
        groups = self.schedule.factors
        return rates | {f"learning_rate_{name}": self.schedule.rate(self.num_steps, name) for name in groups}
