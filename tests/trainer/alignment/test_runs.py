"""Whole runs whose reward aligns what is heard with what is read (TARS)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from tests.gloo import run_ranks
from tests.reward.embedding.small_embedder import write_embedder
from tests.tiny_run import WORDS, metrics
from tests.trainer.runs.test_train import alone, run_all, stop_after

WEIGHTS = {"agreement": 1.0, "layers": 2.0, "embedding": 0.5}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": (),
    "tp2 packed": ("parallel.tp=2", "train.packing=packed"),
    "pp2": ("parallel.pp=2",),
    "cp2": ("parallel.cp=2",),
}


def settings(inputs: Path) -> tuple[str, ...]:
    """Return those of TARS on the tiny run, with the teacher's answer for right."""
    reward = ", ".join(f"{name}: {weight}" for name, weight in WEIGHTS.items())
    text = "text: {kind: policy_gradient, student: read, responses: 3, reward: {agreement: 1}}"
    speech = f"speech: {{kind: policy_gradient, student: hear, responses: 2, align_with: text, reward: {{{reward}}}}}"
    return (
        f"objective.streams={{{text}, {speech}}}",
        "objective.divergence.kind=none",
        "objective.policy_gradient={surrogate: clipped, normalization: token}",
        f"reward.embedding={{checkpoint: {inputs / 'embedder'}, pooling: last, batch_size: 3}}",
        "rollout.policy_temperature=0.3",
        "train.steps=3",
        "checkpoint.keep=0",
    )


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run on one rank."""
    (inputs / "embedder").mkdir()
    write_embedder(inputs / "embedder", ["?", *WORDS])
    return alone(inputs, tmp_path_factory.mktemp("tars") / "run", *settings(inputs))


def rewards(run: Path) -> list[dict[str, Any]]:
    """Return what the dump says of every response."""
    keys = ("position", "draw", "response", "reward", "reward_terms", "advantage")
    rows = [row for step in (1, 2, 3) for row in read_rollouts(dump_file(run / "rollouts", step)).to_pylist()]
    return [{key: dict(row[key]) if key == "reward_terms" else row[key] for key in keys} for row in rows]


def test_what_is_heard_is_rewarded_for_being_like_what_is_read(whole: Path) -> None:
    """Catches a term that is not in the reward, that another stream has, and advantages over both modalities."""
    rows = rewards(whole)
    assert len(rows) == 3 * 2 * 5
    text, speech = [r for r in rows if r["draw"] <= 3], [r for r in rows if r["draw"] > 3]
    assert all(r["reward_terms"].keys() == {"agreement"} for r in text)
    for row in speech:
        assert row["reward_terms"].keys() == WEIGHTS.keys()
        assert row["reward"] == pytest.approx(sum(WEIGHTS[name] * v for name, v in row["reward_terms"].items()))
        assert all(-1 <= value <= 1 + 1e-6 for value in row["reward_terms"].values())
    aligned = [r for r in speech if r["reward_terms"]["layers"]]
    assert aligned, "the test's own data must give some right answer to what is read"
    assert any(r["reward_terms"]["embedding"] not in (0.0, 1.0) for r in aligned)
    for group in (text, speech):
        size = 3 if group is text else 2
        for start in range(0, len(group), size):
            members = group[start : start + size]
            mean = sum(r["reward"] for r in members) / size
            assert [r["advantage"] for r in members] == pytest.approx([r["reward"] - mean for r in members], abs=1e-6)
    line = metrics(whole)[0]
    assert {f"stream/speech/reward_{name}" for name in WEIGHTS} | {"stream/text/reward"} <= line.keys()
    assert line["stream/speech/loss"] + line["stream/text/loss"] == pytest.approx(line["loss"], abs=1e-7)


def test_a_resumed_run_has_the_same_rewards(whole: Path, inputs: Path, tmp_path: Path) -> None:
    """Catches states of other weights than those that a step begins with."""
    resumed = alone(inputs, stop_after(2, whole, tmp_path / "resumed"), *settings(inputs))
    assert rewards(resumed) == rewards(whole)


@pytest.mark.slow
def test_every_layout_has_the_same_rewards(whole: Path, inputs: Path, tmp_path: Path) -> None:
    """Catches ranks that compare other pairs, and a rank that waits for others in a forward pass of its own."""
    runs = {name: (None, (*settings(inputs), *more)) for name, more in LAYOUTS.items()}
    run_ranks(run_all, 2, str(inputs), str(tmp_path), runs)
    for name in LAYOUTS:
        for got, wanted in zip(rewards(tmp_path / name), rewards(whole), strict=True):
            assert got["reward_terms"] == pytest.approx(wanted["reward_terms"], abs=1e-4)
            assert got["response"] == wanted["response"] and got["advantage"] == pytest.approx(
                wanted["advantage"], abs=1e-3
            )
