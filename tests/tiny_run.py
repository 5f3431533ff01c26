"""A run small enough for a test: a random checkpoint of 30,000 parameters, shards of noise, a few steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.writer import ShardWriter

ROOT = Path(__file__).parents[1]
SIZES: dict[str, int] = {
    "mel_bins": 16,
    "window_seconds": 1,
    "encoder_hidden_size": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "encoder_ffn_size": 32,
    "hidden_size": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "ffn_size": 32,
    "max_positions": 128,
}
NUMBERS = ["one", "two", "three", "four"]
WORDS = ["what", "is", "plus", "answer", *NUMBERS]


def write_checkpoint(directory: Path, seed: int = 0, **sizes: int) -> Path:
    """Write a tiny checkpoint; `sizes` replace fields of TinyModelConfig."""
    create_checkpoint(directory, TinyModelConfig(**(SIZES | sizes)), WORDS, seed=seed)
    return directory


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Questions with clips of noise, a quarter to a whole second long."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        first, second = rng.integers(1, 3, size=2)
        samples.append(
            Sample(
                id=f"s{seed}-{i}",
                question=f"what is {NUMBERS[first - 1]} plus {NUMBERS[second - 1]}",
                waveform=(0.1 * rng.normal(size=int(rng.integers(4000, 16001)))).astype(np.float32),
                answer=str(first + second),
                voice=f"voice{i % 2}",
            )
        )
    return samples


def write_shards(directory: Path, samples: Sequence[Sample]) -> Path:
    """Write a complete directory of shards, three samples each."""
    writer = ShardWriter(directory, shard_size=3)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return directory


def write_inputs(directory: Path) -> Path:
    """`checkpoint`, `train` and `heldout` in one directory."""
    write_checkpoint(directory / "checkpoint")
    write_shards(directory / "train", make_samples(10, seed=1))
    write_shards(directory / "heldout", make_samples(4, seed=2))
    return directory


def overrides(inputs: Path, output: Path, *more: str) -> list[str]:
    """Return the settings of a run of five steps on the inputs of `write_inputs`; later ones win."""
    return [
        f"output_dir={output}",
        f"model.checkpoint={inputs / 'checkpoint'}",
        "model.dtype=float32",
        f"data.train={inputs / 'train'}",
        f"data.evaluation={inputs / 'heldout'}",
        "rollout.prompts_per_step=4",
        "rollout.policy_prompts_per_step=2",
        "rollout.policy_rollouts=3",
        "rollout.max_new_tokens=6",
        "objective.token_weights.top_k=2",
        "optimizer.learning_rate=1e-3",
        "train.steps=5",
        "train.micro_batch_size=3",
        "checkpoint.interval=2",
        "evaluation.interval=0",
        "evaluation.max_new_tokens=4",
        "evaluation.scored=2",
        *more,
    ]


def make_run(settings: Sequence[str]) -> int:
    """Train on this rank by these settings; return the exit status.

    Without the report at the end: drawing it takes as long as all the rest of a run of five steps.
    """
    # Not above: most who write tiny inputs do without Megatron-Core, whose import takes seconds.
    from megatron_cord.config.loading import load_config
    from megatron_cord.train import train
    from megatron_cord.trainer.config import RunConfig

    with mock.patch("megatron_cord.train.write_report"):
        return train(load_config(RunConfig, None, settings))


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(line["loss"], line["grad_norm"]) for line in metrics(output)]


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def start(
    settings: Sequence[str], *, ranks: int = 2, launcher: Sequence[str] = (), **options: Any
) -> subprocess.Popen[str]:
    """Start `megatron_cord.train` in a process group of its own, under the launcher if there are several ranks."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "MASTER_PORT")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    train = ["-m", "megatron_cord.train", "--config", os.devnull, *settings]
    under = (
        ["-m", "megatron_cord.launch", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), *launcher]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *under, *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        **options,
    )


@contextmanager
def small_file_system(place: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size (as mount has it) at a new directory; skip the test where it may not."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and standard error."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors
