"""The best evaluation of a run, and when evaluations that are no better end it.

Only evaluations of trained weights count, not the one that a run begins with. They are read from the run's directory,
so a resumed run has what came before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EarlyStoppingConfig
from megatron_cord.evaluation.files import read_result, set_files


@dataclass(frozen=True)
class Best:
    """The evaluation with the best value.

    Attributes:
        step: after which it was made.
        set: of questions.
        metric: of its result.
        value: of the metric.
    """

    step: int
    set: str
    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric.replace('_', ' ')} {self.value:.1%} on {self.set} after step {self.step}"


class BestEvaluation:
    """Follows one metric of one set from evaluation to evaluation.

    Args:
        config: which, and how long a run goes on without a better one.
        past: values of earlier evaluations by step, ascending.

    Attributes:
        best: so far; None before the first evaluation. Of equal ones the earliest.
    """

    def __init__(self, config: EarlyStoppingConfig, past: Mapping[int, float]) -> None:
        self._config = config
        self.best: Best | None = None
        self._reference, self._in_vain = 0.0, 0  # the last value that counted as better, and evaluations since
        for step, value in past.items():
            self.add(step, value)

    def add(self, step: int, value: float) -> bool:
        """Add an evaluation; return whether it is the best so far."""
        config = self._config
        sign = -1.0 if config.metric == "gap" else 1.0
        if self.best is None or sign * (value - self._reference) > config.min_delta:
            self._reference, self._in_vain = value, 0
        else:
            self._in_vain += 1
        is_best = self.best is None or sign * (value - self.best.value) > 0
        if is_best:
            self.best = Best(step, config.set, config.metric, value)
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether the run ends for want of a better evaluation."""
        return 0 < self._config.patience <= self._in_vain


def value_of(config: EarlyStoppingConfig, result: Mapping[str, Any]) -> float:
    """Return the value that counts from the result of its set.

    Raises:
        CordError: the set has no such value.
    """
    value = result.get(config.metric)
    if value is None:
        raise CordError(
            f"evaluation.early_stopping.metric={config.metric}: the set {config.set} has none; choose another one"
        )
    return float(value)


def past_values(config: EarlyStoppingConfig, run: Path, begun: int, last: int) -> dict[int, float]:
    """Return the values of a run's evaluations by step, after the step `begun` and up to `last`.

    A result that cannot be read is left out.
    """
    values = {}
    for step, path in set_files(run, config.set).items():
        if begun < step <= last:
            try:
                values[step] = value_of(config, read_result(path))
            except (CordError, TypeError, ValueError):
                continue
    return values
