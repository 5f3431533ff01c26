"""The controller of a stream's weight: larger while the student lags behind its teacher by more than a budget.

    c_t = ReLU(log q(y_t) − log p(y_t))                                      ``losses.one_sided_gap``
    c̄   = mean over a step's responses of the mean of c_t over their tokens  `mean_gap`
    ε   = mean of c̄ over the first steps, or a given number                  `Controllers.target`
    β  ← clip(β + η (c̄ − ε), minimum, maximum)                               `advance`

Source: OPOD (arXiv 2607.20918), adaptive modality control. The stream's λ is multiplied by β, which begins at 1. The
paper moves β before it trains on the same batch; here c̄ is known after the student's pass, so a step trains with the β
that the steps before it left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import ScoredRollout


@dataclass(frozen=True)
class ControllerConfig:
    """How a stream's weight follows the student: weight times β, which begins at 1."""

    rate: float = 0.1  #: η, how far β moves for each nat a token beyond the target
    warmup_steps: int = 10  #: the target is the mean over so many steps, in which β stays at 1
    minimum: float = 0.1  #: of β
    maximum: float = 2.0  #: of β
    target: float | None = None  #: ε, nats a token; null: measured in warmup_steps
    target_minimum: float = 0.02  #: of a measured target

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise CordError(f"controller.rate is {self.rate:g}; give a number above 0, or leave the controller out")
        if self.warmup_steps < 1:
            raise CordError(
                f"controller.warmup_steps is {self.warmup_steps}; the target is measured in at least 1, or given as "
                "controller.target"
            )
        if not 0 < self.minimum <= 1 <= self.maximum < math.inf:
            raise CordError(
                f"controller.minimum is {self.minimum:g} and maximum {self.maximum:g}; the factor begins at 1, which "
                "must lie between them, and stays above 0"
            )
        if self.target_minimum < 0 or (self.target is not None and self.target < 0):
            raise CordError("controller.target and target_minimum cannot be negative: no gap is")


@dataclass(frozen=True)
class ControllerState:
    """What a controller has seen.

    Attributes:
        factor: β.
        steps: of its warm-up that are over.
        gap_sum: of their c̄.
    """

    factor: float = 1.0
    steps: int = 0
    gap_sum: float = 0.0


def mean_gap(rollouts: Sequence[ScoredRollout]) -> float:
    """Return c̄ of responses that a teacher has scored, nats a token; NaN without any."""
    means = []
    for rollout in rollouts:
        tokens = rollout.tokens
        if tokens is not None and tokens.teacher_logprobs:
            pairs = zip(tokens.student_logprobs, tokens.teacher_logprobs, strict=True)
            means.append(math.fsum(max(q - p, 0.0) for p, q in pairs) / len(tokens.teacher_logprobs))
    return math.fsum(means) / len(means) if means else math.nan


def target_of(config: ControllerConfig, state: ControllerState) -> float | None:
    """Return ε; None as long as it is being measured."""
    if config.target is not None:
        return config.target
    if state.steps < config.warmup_steps:
        return None
    return max(state.gap_sum / state.steps, config.target_minimum)


def advance(config: ControllerConfig, state: ControllerState, gap: float) -> ControllerState:
    """Return the state after a step whose c̄ was ``gap``; unchanged where that is not a number."""
    if not math.isfinite(gap):
        return state
    target = target_of(config, state)
    if target is None:
        return replace(state, steps=state.steps + 1, gap_sum=state.gap_sum + gap)
    factor = state.factor + config.rate * (gap - target)
    return replace(state, factor=min(max(factor, config.minimum), config.maximum))


class Controllers:
    """The controllers of an objective's streams. Every rank has all of them and the same rollouts.

    Args:
        configs: by stream, of those that have one.
    """

    def __init__(self, configs: Mapping[str, ControllerConfig]) -> None:
        self._configs = dict(configs)
        self._states = {name: ControllerState() for name in configs}

    def factor(self, stream: str) -> float:
        """Return β of a stream; 1 without a controller."""
        return self._states[stream].factor if stream in self._states else 1.0

    def follow(self, rollouts: Mapping[str, Sequence[ScoredRollout]]) -> None:
        """Move every β by a step's rollouts with their token results, by stream."""
        for name, config in self._configs.items():
            self._states[name] = advance(config, self._states[name], mean_gap(rollouts[name]))

    def metrics(self, rollouts: Mapping[str, Sequence[ScoredRollout]]) -> dict[str, float]:
        """Return c̄ of a step's rollouts, by stream, and ε where it is known."""
        metrics = {f"stream/{name}/gap": mean_gap(rollouts[name]) for name in self._configs}
        targets = {name: target_of(config, self._states[name]) for name, config in self._configs.items()}
        return metrics | {f"stream/{name}/target": target for name, target in targets.items() if target is not None}

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint keeps, as JSON has it."""
        return {name: asdict(state) for name, state in self._states.items()}

    def restore(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from what `state` returned; a stream that is new begins anew."""
        for name in self._states.keys() & kept.keys():
            self._states[name] = ControllerState(**kept[name])
