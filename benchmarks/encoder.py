"""How long the audio encoder takes for clips that are shorter than its window, beside transformers' own encoder.

    python -m benchmarks.encoder [--seconds 10] [--clips 4] [--turns 5] [--output benchmarks/results/encoder.json]

Whisper tiny's sizes in Qwen2-Audio's encoder, random weights and features, forward and backward, float32, one thread.
In each turn come the clips and clips that fill the window of 30 s, both through this project's encoder, and the short
ones through transformers', which computes the whole window and masks what follows a clip. Medians of the turns.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from megatron_cord.model.architecture import EncoderArchitecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json

ARCHITECTURE = EncoderArchitecture(
    num_mels=80, hidden_size=384, num_layers=4, num_heads=6, ffn_hidden_size=1536, max_positions=1500
)
FRAMES_A_SECOND = 100


def theirs() -> Qwen2AudioEncoder:
    """Return transformers' encoder of the same sizes."""
    arch = ARCHITECTURE
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=arch.num_mels,
        d_model=arch.hidden_size,
        encoder_layers=arch.num_layers,
        encoder_attention_heads=arch.num_heads,
        encoder_ffn_dim=arch.ffn_hidden_size,
        max_source_positions=arch.max_positions,
    )
    config._attn_implementation = "sdpa"
    encoder: Qwen2AudioEncoder = Qwen2AudioEncoder(config).train()
    return encoder


def whole_window(encoder: Any, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what transformers' encoder makes of the window; its forward has no types."""
    encoded: torch.Tensor = encoder(features, attention_mask=mask).last_hidden_state
    return encoded


def timed(model: torch.nn.Module, encode: Callable[[], torch.Tensor]) -> float:
    """Return the seconds of a pass forward and backward."""
    model.zero_grad()
    begun = time.perf_counter()
    torch.autograd.backward(encode().sum())
    return time.perf_counter() - begun


def measure(seconds: float, clips: int, turns: int) -> dict[str, float]:
    """Return median seconds of the three, and their ratios."""
    arch = ARCHITECTURE
    encoder = AudioEncoder(arch, initialize(ParallelConfig(), seed=0), torch.float32, LayerConfig("torch"))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    other = theirs()
    features = torch.randn(clips, arch.num_mels, arch.window_frames)
    frames = round(seconds * FRAMES_A_SECOND)
    positions = arch.attended_positions(frames)
    mask = torch.zeros(clips, 1, arch.max_positions, arch.max_positions)
    mask[..., positions:] = torch.finfo(torch.float32).min
    ways: dict[str, Callable[[], float]] = {
        "short": lambda: timed(encoder, lambda: encoder(features, (frames,) * clips)),
        "window": lambda: timed(encoder, lambda: encoder(features, (arch.window_frames,) * clips)),
        "transformers": lambda: timed(other, lambda: whole_window(other, features, mask)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            passed = way()
            if turn:  # the first warms up
                taken[name].append(passed)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    finalize()
    return {
        **{f"seconds_{name}": value for name, value in medians.items()},
        "window_over_short": medians["window"] / medians["short"],
        "transformers_over_short": medians["transformers"] / medians["short"],
    }


def main() -> int:
    """Print, and write, the figures."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.seconds, arguments.clips, arguments.turns)
    for name, value in figures.items():
        print(f"{name:>24} {value:.3f}")
    if arguments.output is not None:
        setting = {"seconds": arguments.seconds, "clips": arguments.clips, "turns": arguments.turns}
        machine = f"{os.cpu_count()} cores, {platform.machine()}, one thread, no GPU used"
        write_json(arguments.output, {"machine": machine, "torch": torch.__version__, **setting, **figures})
    return 0


if __name__ == "__main__":
    run(main)
