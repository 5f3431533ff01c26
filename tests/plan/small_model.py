"""A small model to compare plans with; its sizes are odd, so that a wrong formula is not right by chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from examples.quickstart.checkpoint import TinyModelConfig
from megatron_cord.config.loading import load_config
from megatron_cord.model.architecture import Architecture, ExpertsArchitecture
from megatron_cord.model.lalm import LALM
from megatron_cord.trainer.config import RunConfig

SIZES = TinyModelConfig(
    mel_bins=16, window_seconds=1, encoder_hidden_size=48, encoder_layers=3, encoder_heads=4, encoder_ffn_size=80,
    hidden_size=64, layers=4, heads=8, kv_heads=2, ffn_size=112, max_positions=128,
)  # fmt: skip
PARTS = ("audio_encoder", "adapter", "language_model")


def configured(checkpoint: Path | str, *more: str) -> RunConfig:
    """Return a run's configuration on it."""
    return load_config(
        RunConfig, None, ["output_dir=x", f"model.checkpoint={checkpoint}", "data.train=x", "data.evaluation=x", *more]
    )


def counts_of(model: LALM) -> list[int]:
    """Count the parameters of each part that is on this rank."""
    return [
        0 if (part := getattr(model, name)) is None else sum(p.numel() for p in part.parameters()) for name in PARTS
    ]


def with_experts(arch: Architecture) -> Architecture:
    """Return the architecture with four experts in each layer, two for a token, and normed queries and keys."""
    mixture = ExpertsArchitecture(4, 2, normalized=True)
    return replace(arch, language=replace(arch.language, experts=mixture, qkv_bias=False, qk_norm=True))
