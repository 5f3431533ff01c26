"""``python -m benchmarks.gpu_hour.inputs DIR full|tiny``: a random Qwen2-Audio, and shards with clips of noise.

Clips are much shorter than the encoder's window, as spoken questions are. The model ends no response early: special
tokens have no weight in its output layer, so that steps are equally long.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.writer import ShardWriter

HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Inputs:
    """Sizes: of the model, its vocabulary, and the shortest and the longest clip in seconds."""

    model: TinyModelConfig
    words: int
    clips: tuple[float, float]


SIZES = {
    # Whisper large's encoder and a language model of 0.7 billion parameters.
    "full": Inputs(
        TinyModelConfig(
            mel_bins=128, hop_length=160, window_seconds=30, encoder_hidden_size=1280, encoder_layers=32,
            encoder_heads=20, encoder_ffn_size=5120, hidden_size=2048, layers=12, heads=16, kv_heads=4, ffn_size=5632,
            max_positions=2048,
        ),
        words=32_000,
        clips=(2.0, 10.0),
    ),
    "tiny": Inputs(
        TinyModelConfig(
            mel_bins=16, window_seconds=1, encoder_hidden_size=16, encoder_layers=1, encoder_heads=2,
            encoder_ffn_size=32, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=32, max_positions=128,
        ),
        words=40,
        clips=(0.25, 0.5),
    ),
}  # fmt: skip


def write_shards(directory: Path, inputs: Inputs, count: int, seed: int) -> None:
    """Write so many questions with clips of noise."""
    rng = np.random.default_rng(seed)
    writer = ShardWriter(directory, shard_size=count)
    for i in range(count):
        question = " ".join(f"w{word}" for word in rng.integers(inputs.words, size=6))
        waveform = (0.1 * rng.normal(size=int(16000 * rng.uniform(*inputs.clips)))).astype(np.float32)
        writer.write(Sample(f"s{seed}-{i}", question, waveform, answer="w1"))
    writer.close()


def main() -> None:
    """Write all inputs."""
    directory, inputs = Path(sys.argv[1]), SIZES[sys.argv[2]]
    checkpoint = directory / "checkpoint"
    create_checkpoint(checkpoint, inputs.model, [f"w{i}" for i in range(inputs.words)], seed=0)
    prompts = PromptBuilder(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    scale = torch.full((prompts.vocab_size, 1), 3.0)
    scale[[*prompts.special_ids, *prompts.eos_ids]] = 0.0
    weights[HEAD] *= scale
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    for number, (name, count) in enumerate((("train", 64), ("heldout", 4))):
        write_shards(directory / name, inputs, count, seed=number)
    print(f"{sum(w.numel() for w in weights.values()) / 1e9:.2f} billion parameters, 68 questions")


if __name__ == "__main__":
    main()
