"""Importance weights of L_tok in a run whose rollouts are of older weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from megatron_cord.trainer.config import RunConfig
from tests.tiny_run import metrics, overrides
from tests.trainer.runs.test_train import alone


def test_weights_of_stale_rollouts(inputs: Path, tmp_path: Path) -> None:
    """Catches the ratio of other tokens or weights than the response's own, and a weight of 1 for whatever is stale."""
    settings = (
        "rollout.schedule.ahead=2",
        "objective.token_weights.factors=importance",
        "objective.policy_gradient.enabled=false",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup_steps=0",
        "train.packing=packed",
    )
    run = alone(inputs, tmp_path / "run", *settings)
    assert [line["staleness_max"] for line in metrics(run)] == [0, 1, 2, 2, 2]
    columns = ("token_weights", "student_logprobs", "engine_logprobs")
    away = 0.0
    for step in range(1, 6):
        for row in read_rollouts(dump_file(run / "rollouts", step), columns).to_pylist():
            ratio, expected = 0.0, []
            for now, then in zip(row["student_logprobs"], row["engine_logprobs"], strict=True):
                expected.append(min(math.exp(ratio), 2.0))
                ratio += now - then
            assert row["token_weights"] == pytest.approx(expected, rel=1e-4)
            away = max(away, *(abs(weight - 1) for weight in expected)) if step > 1 else away
            assert step > 1 or row["token_weights"] == pytest.approx([1.0] * len(expected), rel=1e-3)
    assert away > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("objective.responses=teacher", "objective.policy_gradient.enabled=false"),
            "needs objective.responses=student",
        ),
        (
            ("objective.streams={a: {rollout: hear, student: read}}",),
            r"streams\.a: .* the student's own responses to the",
        ),
        (("objective.streams={a: {source: answer}}",), r"streams\.a: .* choose this view and source"),
    ],
)
def test_importance_needs_the_students_own_responses(
    inputs: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    """Catches ratios of probabilities that belong to another prompt, or to responses that were not sampled."""
    weights = "objective.token_weights.factors=importance"
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, overrides(inputs, tmp_path, weights, *settings))
