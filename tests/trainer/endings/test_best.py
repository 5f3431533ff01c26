"""The best evaluation, and when others that are no better end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EarlyStoppingConfig
from megatron_cord.trainer.endings.best import BestEvaluation, past_values, value_of


@pytest.mark.parametrize(
    ("settings", "values", "best", "over_at"),
    [
        ({"patience": 2}, [0.5, 0.6, 0.6, 0.55], 2, 4),
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.7, 0.1], 5, None),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.58, 0.9], 4, 3),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.61, 0.6, 0.69], 5, 5),
        ({"metric": "gap", "patience": 1}, [0.3, 0.2, 0.25], 2, 3),
        ({}, [0.5] * 9, 1, None),
    ],
)
def test_the_best_and_the_end(settings: dict[str, float], values: list[float], best: int, over_at: int | None) -> None:
    """Catches patience that starts too late or never again, a gap that should grow, a later equal that wins.

    Also small steps that never add up to a better one, and a state that a run which goes on does not have.
    """
    config = EarlyStoppingConfig(**settings)  # type: ignore[arg-type]
    followed = BestEvaluation(config, {})
    over = []
    for step, value in enumerate(values, start=1):
        followed.add(step, value)
        over.append(followed.is_over)
        again = BestEvaluation(config, dict(enumerate(values[:step], start=1)))
        assert (again.best, again.is_over) == (followed.best, followed.is_over)
    assert followed.best is not None and followed.best.step == best
    assert (over.index(True) + 1 if True in over else None) == over_at


def test_values_are_read_from_the_run(tmp_path: Path) -> None:
    """Catches evaluations of steps that are made again, the one that the run began with, and another set's."""
    for step, value in ((4, 0.1), (6, 0.2), (8, 0.3), (10, 0.4)):
        directory = tmp_path / "evaluations" / f"step_{step:06d}"
        directory.mkdir(parents=True)
        (directory / "other.json").write_text(json.dumps({"audio_accuracy": value}))
        (directory / "heldout.json").write_text(json.dumps({"audio_accuracy": 0.9}))
    (tmp_path / "evaluations" / "step_000008" / "other.json").write_text("{")
    assert past_values(EarlyStoppingConfig(set="other"), tmp_path, begun=4, last=8) == {6: 0.2}
    assert past_values(EarlyStoppingConfig(), tmp_path, begun=4, last=8) == {6: 0.9, 8: 0.9}


def test_a_set_without_the_value_is_named() -> None:
    """Catches a run that ends because a set without audio never gets better."""
    with pytest.raises(CordError, match=r"metric=audio_accuracy: the set written has none"):
        value_of(EarlyStoppingConfig(set="written"), {"text_accuracy": 0.5})
