"""A factor of L_seq that changes over the steps of a run, as when distillation begins and reinforcement takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cord.config.curves import remaining
from megatron_cord.errors import CordError


@dataclass(frozen=True)
class WeightSchedule:
    """How the factor goes from `weight` to `final`."""

    kind: Literal["constant", "linear", "cosine"] = "constant"  #: constant: it stays objective.policy_gradient.weight
    final: float | None = None  #: linear, cosine: the factor behind the change
    begin: int = 0  #: linear, cosine: steps before the change
    steps: int | None = None  #: linear, cosine: of the change

    def __post_init__(self) -> None:
        if self.kind == "constant":
            if self.final is not None or self.steps is not None or self.begin:
                raise CordError(
                    "final, begin and steps are of kind=linear and kind=cosine; set kind, or leave them out"
                )
        elif self.final is None or self.steps is None or self.steps < 1:
            raise CordError(f"kind={self.kind} needs final, the factor behind the change, and steps, at least 1")
        elif self.begin < 0:
            raise CordError(f"begin cannot be negative, got {self.begin}")

    def at(self, weight: float, step: int) -> float:
        """Return the factor of the update after so many steps; `weight` is the one before the change."""
        if self.final is None or self.steps is None:
            return weight
        share = min(1.0, max(0.0, (step - self.begin) / self.steps))
        return self.final + (weight - self.final) * remaining("cosine" if self.kind == "cosine" else "linear", share)
