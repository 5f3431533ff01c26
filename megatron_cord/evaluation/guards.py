"""Guards of retention: how far an accuracy has dropped since a baseline, question by question.

    drop = accuracy at the baseline - accuracy now,   over the questions that both evaluations answered

Its 95 % interval is the paired bootstrap of `statistics`: an answer that stays as it was adds nothing to it, so the
interval of a model that answers as before is [0, 0]. It covers the choice of the questions, not other training seeds,
and one evaluation: a run that is evaluated fifty times gives chance fifty occasions, against which `patience` helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import GuardConfig
from megatron_cord.evaluation.files import read_result
from megatron_cord.evaluation.questions import Question
from megatron_cord.evaluation.results import Row, outcomes_of
from megatron_cord.evaluation.statistics import estimate, paired_draws


@dataclass(frozen=True)
class Drop:
    """How far an accuracy has dropped; negative where it has risen.

    Attributes:
        accuracy: now, over the paired questions, a share.
        before: at the baseline, over the same questions.
        drop: the difference.
        low, high: of the 95 % interval of `drop`.
        samples: questions that both evaluations answered.
    """

    accuracy: float
    before: float
    drop: float
    low: float
    high: float
    samples: int

    def exceeds(self, config: GuardConfig) -> bool:
        """Return whether what decides is beyond the guard's limit."""
        return {"low": self.low, "drop": self.drop, "high": self.high}[config.decides] > config.max_drop

    def __str__(self) -> str:
        interval = f"95 % interval {100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{100 * self.drop:.1f} points ({interval}; {self.before:.1%} → {self.accuracy:.1%}, n = {self.samples})"


def measure_drop(before: Mapping[str, float], now: Mapping[str, float]) -> Drop:
    """Compare the outcomes of two evaluations by question, as `outcomes_of` returns them.

    Raises:
        CordError: no question is in both.
    """
    pairs = np.array([(before[name], value) for name, value in now.items() if name in before], dtype=float)
    if not pairs.size:
        raise CordError("the baseline and this evaluation have no question in common")
    was, after = pairs.mean(axis=0)
    draws = paired_draws(pairs)
    found = estimate(float(was - after), draws[:, 0] - draws[:, 1])
    assert found.low is not None, "there are draws"
    assert found.high is not None, "there are draws"
    return Drop(float(after), float(was), found.value, found.low, found.high, len(pairs))


def read_outcomes(path: Path, config: GuardConfig) -> dict[str, float]:
    """Return the outcomes of a guard's questions in a result, a SET.json.

    Raises:
        CordError: the file is missing, damaged, or has no answers to the guard's view.
    """
    rows = _rows(read_result(path), path)
    outcomes = outcomes_of(rows, config.modality)
    if not outcomes:
        raise CordError(f"{path} has no answers from {config.modality} (view {config.view}); evaluate again")
    return outcomes


def read_baseline(
    path: Path, config: GuardConfig, questions: Sequence[Question], max_rejects: float
) -> dict[str, float]:
    """Return a baseline's outcomes, after verifying that it has the guard's questions and could show too large a drop.

    Args:
        path: of a SET.json.
        config: of the guard.
        questions: of the guard's set.
        max_rejects: the largest share of them that it may lack.

    Raises:
        CordError: it lacks the view, or questions; asks others under the same ids; or has so few of them right that no
            drop could exceed the guard's limit.
    """
    outcomes = read_outcomes(path, config)
    asked = [question for question in questions if config.view in question.views]
    rows = {row["id"]: row for row in _rows(read_result(path), path)}
    for question in asked:
        if question.id in rows and (question.asked, question.answer) != tuple(
            rows[question.id].get(key) for key in ("question", "answer")
        ):
            raise CordError(
                f"{path}: {question.id} is another question, or has another answer, than in the set {config.set}; "
                "evaluate the baseline on the present set"
            )
    kept = {question.id: outcomes[question.id] for question in asked if question.id in outcomes}
    _check_whole(path, kept, asked, config, max_rejects)
    check_useful(str(path), kept, config)
    return kept


def check_useful(source: str, outcomes: Mapping[str, float], config: GuardConfig) -> None:
    """Refuse a baseline's outcomes since which no drop could exceed the guard's limit.

    Raises:
        CordError: so few of them are right; names the source.
    """
    worst = measure_drop(outcomes, dict.fromkeys(outcomes, 0.0))
    if not worst.exceeds(config):
        raise CordError(
            f"{source}: the baseline's accuracy is {worst.before:.1%} on {worst.samples} questions, so that no drop "
            f"could exceed max_drop={config.max_drop:g} (decides={config.decides}); lower it, or guard another set"
        )


def guard_result(config: GuardConfig, drop: Drop) -> dict[str, Any]:
    """Return what a guard measured, with its settings and whether it held, as JSON has them."""
    settings = {key: getattr(config, key) for key in ("set", "view", "max_drop", "decides", "action")}
    return {**settings, **asdict(drop), "held": not drop.exceeds(config)}


def compare_guarded(
    guards: Mapping[str, GuardConfig], baselines: Mapping[str, Mapping[str, float]], rows: Mapping[str, Sequence[Row]]
) -> dict[str, dict[str, Any]]:
    """Return each guard's result on answers that are compared once, as `evaluate` does.

    Args:
        guards: by name.
        baselines: outcomes of those that have one.
        rows: of each set.

    Raises:
        CordError: a set has no answers to a guard's view, or none to a question of its baseline.
    """
    results = {}
    for name, config in guards.items():
        if name not in baselines:
            results[name] = {"set": config.set, "view": config.view, "held": None}
            continue
        now = outcomes_of(rows[config.set], config.modality)
        try:
            results[name] = guard_result(config, measure_drop(baselines[name], now))
        except CordError as error:
            raise CordError(f"evaluation.guards.{name}: {error}") from None
    return results


def _check_whole(
    path: Path, kept: Mapping[str, float], asked: Sequence[Question], config: GuardConfig, max_rejects: float
) -> None:
    if len(asked) - len(kept) > max_rejects * len(asked):
        raise CordError(
            f"{path} has answers to {len(kept)} of the {len(asked)} questions of the set {config.set}; evaluate the "
            "baseline on the whole set"
        )


def baseline_file(config: GuardConfig, own: Path) -> Path:
    """Return the result that a guard compares with; `own` is that of the run's first evaluation."""
    if config.baseline is None:
        return own
    given = Path(config.baseline)
    return given / f"{config.set}.json" if given.is_dir() else given


def _rows(result: Mapping[str, Any], path: Path) -> list[Row]:
    rows = result.get("answers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
        raise CordError(f"{path} is no result of an evaluation: it has no answers; evaluate again")
    return rows
