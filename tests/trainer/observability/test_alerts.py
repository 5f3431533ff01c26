"""Alerts on synthetic histories: each kind is raised where it should be, and not where a healthy run looks similar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.alerts import AlertConfig, find_alerts
from tests.trainer.runs.test_train import alone

STEPS = 200
Curve = Callable[[float], float]


def history(curves: Mapping[str, Curve] | None = None, steps: int = STEPS) -> list[dict[str, Any]]:
    """Return a healthy, noisy run in which the named metrics follow these curves of its progress in [0, 1] instead."""
    rng = np.random.default_rng(0)
    healthy: dict[str, Curve] = {
        "reward": lambda t: 0.4 + 0.5 * t,
        "entropy": lambda t: 0.2 + 0.6 * math.exp(-3 * t),
        "response_tokens": lambda t: 12 + 4 * t,
        "truncated": lambda t: 0.02,
        "repetition": lambda t: 0.05,
        "zero_variance_groups": lambda t: 3 + 2 * t,
        "engine_logprob_difference": lambda t: 1e-3,
        "kl": lambda t: 0.1 + 0.4 * math.exp(-4 * t),
        "grad_norm": lambda t: 1 + 4 * math.exp(-4 * t),
        "gradient_clipped": lambda t: 0.2,
    }
    rows = []
    for step in range(1, steps + 1):
        values = {
            name: max(curve(step / steps) * (1 + 0.15 * float(rng.normal())), 0.0)
            for name, curve in (healthy | dict(curves or {})).items()
        }
        rows.append({"step": step, "groups": 8, "skipped": False, "learning_rate": 3e-3} | values)
    return rows


def evaluations(*audio: float, text: float = 0.95, samples: int = 500) -> list[dict[str, Any]]:
    return [
        {"step": 50 * i, "samples": samples, "text_accuracy": text, "audio_accuracy": value}
        for i, value in enumerate(audio)
    ]


def kinds(rows: list[dict[str, Any]], seen: list[dict[str, Any]] | None = None, **settings: Any) -> list[str]:
    return [alert.kind for alert in find_alerts(rows, seen or [], AlertConfig(**settings))]


@pytest.mark.parametrize(
    ("kind", "setting", "curves", "words"),
    [
        ("collapse", "reward_fall", {"reward": lambda t: 0.8 if t < 0.7 else 0.3}, "the reward fell from 0.8"),
        (
            "collapse",
            "repetition",
            {"repetition": lambda t: 0.05 if t < 0.6 else 0.7},
            r"% of a response's phrases are repetitions \(at first 5%\)",
        ),
        (
            "length explosion",
            "length_growth",
            {"response_tokens": lambda t: 12 * math.exp(2 * t)},
            r"responses have \d+ tokens, at first 1\d",
        ),
        (
            "length explosion",
            "truncated",
            {"truncated": lambda t: 0.02 if t < 0.8 else 0.5},
            "are truncated at rollout.max_new_tokens, at first 2%",
        ),
        (
            "reward saturated",
            "zero_variance_groups",
            {"zero_variance_groups": lambda t: 4 if t < 0.5 else 8},
            "of the groups .mean reward 0.8",
        ),
        (
            "reward missing",
            "zero_variance_groups",
            {"zero_variance_groups": lambda t: 8, "reward": lambda t: 0.03},
            r"of the groups \(mean reward 0.03\): right answers are too rare for L_seq",
        ),
        (
            "diverging",
            "kl_growth",
            {"kl": lambda t: 0.2 if t < 0.5 else 0.8},
            r"the divergence from the teacher is 0\.[78]\d* nats a token, [34]\.\d times .*_rate \(up to 0\.003\) is",
        ),
        (
            "diverging",
            "clipped",
            {"gradient_clipped": lambda t: 0.1 if t < 0.6 else 1.0},
            r"1\d\d% of the updates are clipped at optimizer.clip_norm, at first 1\d%",
        ),
        ("entropy falling", "entropy_fall", {"entropy": lambda t: math.exp(-6 * t)}, "entropy fell from .* to 0.00"),
        (
            "logprob mismatch growing",
            "logprob_mismatch_growth",
            {"engine_logprob_difference": lambda t: 1e-3 + 0.2 * t},
            "differ by 0.1.* nats a token",
        ),
    ],
)
def test_each_is_raised_and_can_be_turned_off(kind: str, setting: str, curves: dict[str, Curve], words: str) -> None:
    """Catches a run that goes wrong without an alert, an alert without figures, and a setting without effect."""
    rows = history(curves)
    (alert,) = find_alerts(rows, [], AlertConfig())
    assert alert.kind == kind
    assert re.search(words, alert.words), alert.words
    assert kinds(rows, **{setting: None}) == []


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"reward": lambda t: 0.8 - 0.1 * t},  # a slow, small fall
        {"reward": lambda t: 0.8 if t > 0.4 else 0.2},  # it has recovered
        {"repetition": lambda t: 0.4},  # the task itself repeats: no change since the start
        {"response_tokens": lambda t: 12 + 10 * t},  # longer, not twice as long
        {"truncated": lambda t: 0.5},  # as at first
        {"zero_variance_groups": lambda t: 6 + t},  # most groups, not all
        {"entropy": lambda t: 0.1 + 0.9 * math.exp(-6 * t)},  # a student that learns to be as sure as its teacher
        {"engine_logprob_difference": lambda t: 1e-6 + 1e-3 * t},  # many times as much, but rounding
        {"engine_logprob_difference": lambda t: 0.05},  # bf16: large from the start
        {"reward": lambda t: -0.5 + 0.2 * t},  # a reward may be negative
        {"kl": lambda t: 0.2 + 0.06 * t},  # a little farther from the teacher
        {"grad_norm": lambda t: 5 * math.exp(-6 * t)},  # the gradient vanishes as the student arrives
        {"gradient_clipped": lambda t: 0.9},  # as at first
    ],
)
def test_a_healthy_run_raises_nothing(curves: dict[str, Curve]) -> None:
    """Catches an alert at any moment of a run that only looks similar (a false positive)."""
    rows = history(curves)
    for step in range(0, STEPS + 1, 5):
        assert find_alerts(rows[:step], [], AlertConfig()) == []


def test_noise_alone_raises_nothing() -> None:
    """Catches thresholds within the noise of few rewards: runs of 24 coin flips a step that never change."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = [{"step": step, "reward": rng.binomial(24, 0.3) / 24} for step in range(1, 201)]
        assert [kinds(rows[:step], reward_fall=0.05) for step in range(40, 201, 5)] == [[]] * 33


def test_a_learning_rate_that_is_much_too_high_is_seen_in_the_first_steps() -> None:
    """Catches a student that is destroyed at its first update and that nothing says so of before forty steps."""
    rows = [
        {"step": 1, "kl": 0.4, "grad_norm": 3.0, "entropy": 0.8, "learning_rate": 3e-3},
        *({"step": s, "kl": 2.0, "grad_norm": 0.01, "entropy": 0.01, "learning_rate": 3e-3} for s in range(2, 9)),
    ]
    assert [kinds(rows[:steps]) for steps in range(9)] == [[]] * 4 + [["diverging"]] * 5
    assert find_alerts(rows[:4], [], AlertConfig())[0].words == (
        "the divergence from the teacher is 2 nats a token, 5.0 times the untrained model's 0.4; "
        "the gradient norm fell from 3 to 0.01; the student's entropy went from 0.8 to 0.01 nats a token: "
        "optimizer.learning_rate (up to 0.003) is probably too high"
    )
    slow = [row | {"kl": 0.7} for row in rows[1:]]
    assert kinds([rows[0], *slow]) == ["diverging"]  # less, but the gradient is gone
    assert kinds([rows[0], *(row | {"grad_norm": 3.0} for row in slow)]) == []  # within the noise of single steps


def test_single_steps_of_few_questions_raise_nothing() -> None:
    """Catches thresholds within the noise of steps of eight questions, whose divergence varies by a quarter."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rows = [{"step": s, "kl": abs(rng.normal(0.4, 0.1)), "grad_norm": abs(rng.normal(3, 1))} for s in range(1, 101)]
        assert [kinds(rows[:steps]) for steps in range(1, 101)] == [[]] * 100, seed


def test_real_runs(inputs: Path, tmp_path: Path) -> None:
    """Catches an alert of a run as it should be, and none of the same run at a hundred times its learning rate."""
    settings = ("train.steps=10", "checkpoint.interval=0", "metrics.tensorboard=false")
    fine = alone(inputs, tmp_path / "fine", *settings)
    assert not (fine / "alerts.jsonl").exists()
    wrong = alone(inputs, tmp_path / "wrong", *settings, "optimizer.learning_rate=0.1")
    (alert,) = [json.loads(line) for line in (wrong / "alerts.jsonl").read_text().splitlines()]
    assert (alert["kind"], alert["step"]) == ("diverging", 6)
    untrained = json.loads((wrong / "metrics.jsonl").read_text().splitlines()[0])["kl"]
    assert (
        f"times the untrained model's {untrained:.3g}" in alert["words"]
        and "learning_rate (up to 0.1)" in alert["words"]
    )


def test_accuracy() -> None:
    """Catches a fall of text accuracy without an alert, an alert within the error of few questions, one at first."""
    (alert,) = find_alerts([], evaluations(0.4, 0.8, 0.6), AlertConfig())
    assert (alert.kind, alert.words) == ("collapse", "audio accuracy fell from 80% (step 50) to 60%")
    forgotten = evaluations(0.4, 0.8)
    forgotten[-1]["text_accuracy"] = 0.7
    assert "text accuracy fell from 95% (step 0) to 70%" in find_alerts([], forgotten, AlertConfig())[0].words
    for fine in ((), (0.4,), (0.4, 0.8, 0.75), (0.4, 0.8, 0.6, 0.85)):
        assert kinds([], evaluations(*fine)) == []
    assert kinds([], evaluations(0.8, 0.6, samples=10)) == []
    assert kinds([], evaluations(1.0, 0.2, samples=8)) == []  # eight questions are no evaluation
    assert kinds([], evaluations(1.0, 0.87, samples=30)) == []  # within noise, though all were right
    assert kinds([], evaluations(0.8, 0.6), accuracy_fall=None) == []


def test_a_collapse_names_all_its_signs() -> None:
    """Catches an entropy that fell with the reward and is left out: it distinguishes a collapse from a bad judge."""
    rows = history({"reward": lambda t: 0.8 if t < 0.7 else 0.1, "entropy": lambda t: 0.8 if t < 0.7 else 0.2})
    (alert,) = find_alerts(rows, evaluations(0.8, 0.3), AlertConfig())
    assert all(part in alert.words for part in ("the reward fell", "audio accuracy fell", "entropy fell from 0."))


def test_little_or_broken_history() -> None:
    """Catches an alert before there is anything to compare with, and a division by zero without measurements."""
    rows = history({"reward": lambda t: 1.0 - t}, steps=39)
    assert kinds(rows) == [] and kinds(rows, window=4) == ["collapse"]
    broken = [
        {"step": i, "reward": None, "entropy": math.nan, "groups": 0, "zero_variance_groups": 0} for i in range(100)
    ]
    assert kinds(broken) == []
    holes = [
        row if row["step"] % 3 else {"step": row["step"]}
        for row in history({"reward": lambda t: 0.8 if t < 0.6 else 0.2})
    ]
    assert kinds(holes) == ["collapse"]


@pytest.mark.parametrize(
    "wrong", [{"window": 1}, {"reward_fall": 0.0}, {"zero_variance_groups": 1.5}, {"length_growth": 1.0}]
)
def test_thresholds_that_cannot_be(wrong: dict[str, Any]) -> None:
    """Catches a threshold that always or never holds."""
    with pytest.raises(CordError, match=rf"alerts\.{next(iter(wrong))}"):
        AlertConfig(**wrong)
