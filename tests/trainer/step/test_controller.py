"""The controller of a stream's weight, against OPOD's equations in loops, and in runs that are stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, one_sided_gap
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults
from megatron_cord.trainer.step.controller import ControllerConfig, Controllers, mean_gap
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.streams import StreamConfig
from tests.tiny_run import metrics, write_inputs
from tests.trainer.runs.test_train import alone, stop_after

CONFIG = ControllerConfig(rate=0.5, warmup_steps=2, minimum=0.25, maximum=1.5, target_minimum=0.0)


def scored(student: list[float], teacher: list[float] | None) -> ScoredRollout:
    """Return a response with these log-probabilities."""
    rollout = Rollout("sample", tuple(range(len(student))), tuple(student), "stop", (), "")
    kl = None if teacher is None else [0.0] * len(student)
    return ScoredRollout(rollout, "distill", tokens=TokenResults(kl, None, student, teacher))


def test_the_gap_is_a_mean_of_means() -> None:
    """Catches a mean over all tokens, a gap where the student is ahead, and a gradient of the other sign."""
    long, short = scored([-1.0, -2.0, -3.0, -1.0], [-0.5, -2.5, -1.0, -1.0]), scored([-2.0], [-1.0])
    assert mean_gap([long, short, scored([-9.0], None)]) == pytest.approx(((0.5 + 2.0) / 4 + 1.0) / 2)
    student = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -2.5, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    gap = one_sided_gap(student, teacher)
    assert gap.tolist() == [0.5, 0.0, 2.0, 0.0]
    gap.sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and student.grad.tolist() == [-1.0, 0.0, -1.0, 0.0] and teacher.grad is None


def test_the_factor_follows_the_equation() -> None:
    """Catches a step of warm-up that moves β, a target that moves later, a missing clip, and a step without a gap."""
    gaps = [0.4, 0.6, 0.9, 1.5, 0.1, float("nan"), *[0.0] * 6]
    controllers, factors, expected, factor = Controllers({"a": CONFIG}), list[float](), list[float](), 1.0
    for step, gap in enumerate(gaps):
        rollouts = [] if gap != gap else [scored([-5.0], [-5.0 + gap])]
        assert ("stream/a/target" in controllers.metrics({"a": rollouts})) == (step >= 2)
        controllers.follow({"a": rollouts})
        factors.append(controllers.factor("a"))
        if step >= 2 and gap == gap:
            factor = min(max(factor + 0.5 * (gap - 0.5), 0.25), 1.5)
        expected.append(factor)
    assert factors == pytest.approx(expected) and max(factors) == 1.5 and min(factors) == 0.25
    given = Controllers({"a": replace(CONFIG, target=1.0)})
    given.follow({"a": [scored([-5.0], [-4.6])]})
    assert given.factor("a") == pytest.approx(1.0 + 0.5 * (0.4 - 1.0)) and given.factor("b") == 1.0
    floor = Controllers({"a": replace(CONFIG, target_minimum=0.7)})
    for _ in range(3):
        floor.follow({"a": [scored([-5.0], [-4.5])]})
    assert floor.factor("a") == pytest.approx(1.0 + 0.5 * (0.5 - 0.7))


def test_the_state_survives_json() -> None:
    """Catches a digit that a checkpoint loses, and a stream that is gone or new."""
    first = Controllers({"a": CONFIG, "gone": CONFIG})
    for gap in (0.1, 0.7, 1 / 3):
        first.follow({name: [scored([-5.0], [-5.0 + gap])] for name in ("a", "gone")})
    second = Controllers({"a": CONFIG, "new": CONFIG})
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state()["a"] == first.state()["a"] and second.factor("a") == first.factor("a") != 1.0
    assert second.factor("new") == 1.0 and "gone" not in second.state()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "controller.rate is 0"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"minimum": 1.5, "maximum": 2.0}, "which must lie between them"),
        ({"minimum": 0.0}, "stays above 0"),
        ({"target": -0.1}, "cannot be negative"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, float], message: str) -> None:
    """Catches a controller that never moves, or that would turn the stream's gradient around."""
    with pytest.raises(CordError, match=message):
        ControllerConfig(**settings)  # type: ignore[arg-type]


def test_a_stream_without_a_teacher_has_no_gap() -> None:
    """Catches a controller that would be silently without effect."""
    stream = StreamConfig(divergence=DivergenceConfig("nll"), controller=CONFIG)
    with pytest.raises(CordError, match=r"objective\.streams\.a has a controller.*the divergence nll, which has none"):
        ObjectiveConfig(streams={"a": stream})


@pytest.mark.slow
def test_a_resumed_run_has_the_same_weights(tmp_path: Path) -> None:
    """Catches a factor, or a target in the middle of its warm-up, that a checkpoint does not keep; and a λ unused."""
    inputs = write_inputs(tmp_path / "inputs")
    common = ("objective.divergence.kind=one_sided", "objective.policy_gradient.enabled=false", "checkpoint.keep=0")
    stream = "objective.streams={a: {student: hear, teacher: read, weight: 0.5%s}}"
    controlled = (stream % ", controller: {rate: 5, warmup_steps: 3, maximum: 50, target_minimum: 0}", *common)
    whole = alone(inputs, tmp_path / "whole", *controlled)
    lines, constant = metrics(whole), metrics(alone(inputs, tmp_path / "constant", stream % "", *common))
    weights, gaps = ([line[f"stream/a/{key}"] for line in lines] for key in ("weight", "gap"))
    assert weights[:4] == [0.5] * 4 and min(gaps) > 0
    expected = 0.5 * min(max(1 + 5 * (gaps[3] - sum(gaps[:3]) / 3), 0.1), 50)
    assert weights[4] == pytest.approx(expected) and weights[4] != 0.5
    assert [line["loss"] for line in lines[:4]] == [line["loss"] for line in constant[:4]]
    assert lines[4]["loss"] == pytest.approx(constant[4]["loss"] * weights[4] / 0.5, rel=1e-6)
    for step in (2, 4):
        again = metrics(alone(inputs, stop_after(step, whole, tmp_path / f"from {step}"), *controlled))
        for key in ("stream/a/weight", "stream/a/gap", "loss"):
            assert [line[key] for line in again] == [line[key] for line in lines]
