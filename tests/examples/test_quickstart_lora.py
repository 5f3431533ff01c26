"""The quickstart with LoRA: the guard of its written questions holds, and ends a run with too high a learning rate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.checkpoint import create_checkpoint
from examples.quickstart.questions import vocabulary
from examples.quickstart.warmup import warm_up
from megatron_cord.config.loading import load_config
from megatron_cord.parallel.layout import finalize
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig
from tests.examples.test_quickstart_warmup import SHORT, SMALL, questions, spoken
from tests.tiny_run import ROOT, metrics, write_shards


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the settings of a few questions and a small model that answers them, read and heard."""
    root = tmp_path_factory.mktemp("lora")
    create_checkpoint(root / "initial", SMALL, vocabulary(), seed=0)
    warm_up(root / "initial", root / "checkpoint", SHORT, questions(), spoken())
    asked = [replace(s, answer=q.answer) for s, q in zip(spoken(), questions(), strict=True)]
    shards = write_shards(root / "data", asked)
    return [
        f"model.checkpoint={root / 'checkpoint'}",
        f"data.train={shards}",
        f"data.evaluation={shards}",
        "parallel.tp=1",
        "rollout.prompts_per_step=6",
        "rollout.policy_prompts_per_step=2",
        "train.steps=6",
        "checkpoint.interval=0",
        "evaluation.interval=3",
    ]


def summary(settings: list[str], output: Path, *more: str) -> dict[str, Any]:
    """Train by lora.yaml and return the run's summary."""
    file = ROOT / "examples" / "quickstart" / "lora.yaml"
    try:
        assert train(load_config(RunConfig, file, [*settings, f"output_dir={output}", *more])) == 0
    finally:
        finalize()
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_the_guard_holds_and_triggers(settings: list[str], tmp_path: Path) -> None:
    """Catches a guard that ends a run which forgets nothing, and one that lets a run go on which has forgotten all."""
    held = summary(settings, tmp_path / "held")
    assert (held["ended_by"], held["steps"]) == ("steps", 6)
    assert held["guards"]["text"]["held"] and held["guards"]["text"]["before"] == 1.0
    lost = summary(settings, tmp_path / "lost", "optimizer.learning_rate=3", "optimizer.warmup_steps=0")
    assert (lost["ended_by"], lost["steps"], len(metrics(tmp_path / "lost"))) == ("guard", 3, 3)
    assert lost["guard"]["name"] == "text" and lost["guard"]["low"] > lost["guard"]["max_drop"] == 0.05
    page = (tmp_path / "lost" / "report.html").read_text()
    assert "ended by the guard text after step 3" in page and "text: at most −5.0, dropped too far" in page
