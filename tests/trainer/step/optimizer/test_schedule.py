"""Learning rates against Megatron's own scheduler, and schedules that cannot be meant."""

from __future__ import annotations

import math
from typing import Any

import pytest

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.losses.weight_schedule import WeightSchedule
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig, ParameterGroup
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule, RateScheduler

STEPS = 40
WSD = {"lr_decay_style": "WSD", "wsd_decay_steps": 12}


class Optimizer:
    """Two groups as Megatron makes them: one with weight decay, one at three times the rate without."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr_mult": 1.0, "wd_mult": 1.0}, {"lr_mult": 3.0, "wd_mult": 0.0}]


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({}, {"lr_decay_style": "cosine"}),
        ({"warmup_steps": 7}, {"lr_decay_style": "cosine"}),
        ({"schedule": "linear", "warmup_steps": 7}, {"lr_decay_style": "linear"}),
        ({"schedule": "linear", "final_learning_rate_fraction": 0.0}, {"lr_decay_style": "linear"}),
        ({"schedule": "constant", "warmup_steps": 7}, {"lr_decay_style": "constant"}),
        ({"schedule": "wsd", "warmup_steps": 7, "decay_steps": 12}, WSD | {"lr_wsd_decay_style": "linear"}),
        ({"schedule": "wsd", "decay_share": 0.3, "decay_shape": "cosine"}, WSD | {"lr_wsd_decay_style": "cosine"}),
        ({"schedule": "wsd", "decay_steps": 12, "decay_shape": "sqrt"}, WSD | {"lr_wsd_decay_style": "minus_sqrt"}),
    ],
)
def test_rates_are_megatrons(config: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Catches a kind of schedule that begins, bends or ends elsewhere, by one step or by one bit."""
    ours = OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, **config)
    schedule = RateSchedule.of(ours, STEPS)
    mine, other = Optimizer(), Optimizer()
    scheduler = RateScheduler(mine, schedule, ours.weight_decay)
    reference = OptimizerParamScheduler(
        other, schedule.initial, 3e-4, 3e-4 * ours.final_learning_rate_fraction, ours.warmup_steps, STEPS,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant", **theirs,
    )  # fmt: skip
    for step in range(STEPS + 5):
        rate = reference.optimizer.param_groups[0]["lr"]
        assert mine.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12, abs=1e-20), step
        assert mine.param_groups[1]["lr"] == pytest.approx(3 * rate, rel=1e-12, abs=1e-20)
        assert [group["weight_decay"] for group in mine.param_groups] == [0.1, 0.0]
        assert scheduler.rates() == {"learning_rate": mine.param_groups[0]["lr"]}
        for each in (scheduler, reference):
            each.step(1)


def test_groups_share_the_shape() -> None:
    """Catches a group whose warm-up or decay is not a multiple of the others'."""
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, groups={"adapter": ParameterGroup(learning_rate=4e-3)})
    schedule = RateSchedule.of(config, STEPS)
    assert schedule.rate(5, "adapter") == 4e-3
    assert all(schedule.rate(step, "adapter") == 4 * schedule.rate(step) for step in range(STEPS + 2))
    assert schedule.rate(3, "another") == schedule.rate(3)


def test_a_schedule_without_its_newer_fields_is_the_cosine() -> None:
    """Catches checkpoints of earlier revisions that cannot be resumed, or go on at other rates."""
    old = RateSchedule(peak=1e-3, final=1e-4, warmup=3, steps=STEPS)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=3)
    assert old == RateSchedule.of(config, STEPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.schedule=cosin"], r"optimizer\.schedule: expected one of cosine, linear, constant, wsd"),
        (["optimizer.lr_scheduler_type=wsd"], r"did you mean 'optimizer\.schedule'"),
        (["optimizer.decay_steps=10"], "two schedules at once: decay_steps=10 is of schedule=wsd, and schedule=cosine"),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_steps=10", "optimizer.decay_share=0.2"],
            r"two schedules at once: decay_steps=10 and decay_share=0\.2; give one",
        ),
        (
            ["optimizer.schedule=constant", "optimizer.final_learning_rate_fraction=0"],
            "two schedules at once: final_learning_rate_fraction=0.*schedule=constant never falls",
        ),
        (["optimizer.schedule=wsd", "optimizer.decay_share=1.5"], "decay_share must be above 0 and at most 1"),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=1"], "decay_steps must be at least 2, got 1: the first of"),
        (["optimizer.final_learning_rate_fraction=2"], "must lie between 0 and 1"),
        (["optimizer.groups.a.match=adapter.*"], r"optimizer\.groups\.a: a group needs a learning_rate"),
        (["optimizer.groups.a.learning_rate=0"], "learning_rate must be positive.*model.freeze"),
        (["optimizer.groups={'adapter.*': {learning_rate: 1}}"], "becomes the metric"),
        (["objective.policy_gradient.weight_schedule.final=1"], "final, begin and steps are of kind=linear"),
        (["objective.policy_gradient.weight_schedule.kind=linear"], "kind=linear needs final"),
        (
            [
                "objective.policy_gradient.enabled=false",
                "objective.policy_gradient.weight_schedule={kind: linear, final: 0, steps: 5}",
            ],
            "weight_schedule has nothing to weigh",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: list[str], message: str) -> None:
    """Catches a schedule that is silently not the one that was asked for."""
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, ["output_dir=o", "model.checkpoint=c", *settings])


def test_a_run_too_short_for_its_decay_is_refused() -> None:
    """Catches a decay that begins inside the warm-up."""
    config = OptimizerConfig(schedule="wsd", warmup_steps=30, decay_steps=20)
    with pytest.raises(CordError, match=r"warmup_steps=30 and a decay of 20 steps do not fit into train\.steps=40"):
        RateSchedule.of(config, STEPS)


def test_a_decay_lowers_the_rate() -> None:
    """Catches a decay of one step, after which the run ends without an update below the peak."""
    with pytest.raises(CordError, match=r"decay_share=0\.02 of train\.steps=40 is a decay of 1 steps, and it takes 2"):
        RateSchedule.of(OptimizerConfig(schedule="wsd", decay_share=0.02), STEPS)
    short = RateSchedule.of(OptimizerConfig(schedule="wsd"), 5)
    assert [short.rate(3), short.rate(4)] == pytest.approx([3e-5, 1.65e-5])


def test_the_policy_gradients_weight_moves_between_its_ends() -> None:
    """Catches a change that begins or ends at another step, or in another shape."""
    linear, cosine = (WeightSchedule(kind, final=3.0, begin=4, steps=8) for kind in ("linear", "cosine"))
    assert [linear.at(1.0, step) for step in (0, 4, 5, 8, 12, 99)] == [1.0, 1.0, 1.25, 2.0, 3.0, 3.0]
    assert cosine.at(1.0, 6) == pytest.approx(3.0 - 2.0 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert WeightSchedule().at(0.7, 50) == 0.7
