"""Recordings of words, and warm-ups of a second or two on them.

A word is a tone, so that a random encoder's states tell words apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.warmup.config import CtcConfig, DistillationConfig, RegressionConfig, WarmupConfig
from megatron_cord.warmup.warmup import warm_up
from tests.convert.graft.test_graft import WORDS

SPOKEN = WORDS[2:]


def recording(words: list[str]) -> np.ndarray:
    """Return a tone of 0.4 s for each word, and a pause behind it."""
    time = np.arange(6400) / 16000
    pause = np.zeros(1600, np.float32)
    tones = [0.5 * np.sin(2 * np.pi * (300 + 700 * SPOKEN.index(word)) * time).astype(np.float32) for word in words]
    return np.concatenate([part for tone in tones for part in (tone, pause)])


def write_corpus(directory: Path, number: int, seed: int = 0, *more: Sample) -> Path:
    rng = np.random.default_rng(seed)
    writer = ShardWriter(directory, shard_size=16)
    for index in range(number):
        words = [str(word) for word in rng.choice(SPOKEN, size=int(rng.integers(2, 5)))]
        writer.write(Sample(f"s{seed}-{index}", " ".join(words), waveform=recording(words)))
    for sample in more:
        writer.write(sample)
    writer.close()
    return directory


def config_of(inputs: Path, output: Path, **settings: Any) -> WarmupConfig:
    """Return a warm-up of a second or two."""
    usual: dict[str, Any] = {
        "dtype": "float32",
        "held_out_share": 0.2,
        "warmup_steps": 5,
        "save_interval": 4,
        "ctc": CtcConfig(steps=60, batch_size=16, learning_rate=5e-3, hidden_size=48),
        "regression": RegressionConfig(steps=120, batch_size=16, learning_rate=5e-3, filler="user"),
    }
    where = {"output_dir": str(output), "checkpoint": str(inputs / "grafted"), "data": str(inputs / "data")}
    return WarmupConfig(**(where | usual | settings))


def warm_up_alone(config: WarmupConfig) -> None:
    """Warm up on one rank, whose layout ends with it."""
    warm_up(config, initialize(ParallelConfig(), seed=0))
    finalize()


def summary(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return content


def after_calls(number: int) -> Callable[[], bool]:
    """Return a request to stop that comes with this call."""
    calls = count(1)
    return lambda: next(calls) >= number


def distilled_config(inputs: Path, output: Path, **settings: Any) -> WarmupConfig:
    """Return a warm-up of all three stages, the first two of them short."""
    few: dict[str, Any] = {"batch_size": 16, "learning_rate": 5e-3}
    usual: dict[str, Any] = {"steps": 10, "micro_batch_size": 3, "instruction": "what is", "measured": 5}
    return config_of(
        inputs,
        output,
        ctc=CtcConfig(steps=8, hidden_size=48, **few),
        regression=RegressionConfig(steps=8, filler="user", **few),
        distillation=DistillationConfig(**(few | {"batch_size": 8} | usual | settings)),
    )
