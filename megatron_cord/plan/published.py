"""The sizes of published models, for plans without their files. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture

PUBLISHED = (
    "audio_flamingo_3",
    "qwen2_5_omni_7b",
    "qwen2_audio_7b",
    "qwen3_omni_30b_a3b",
    "step_audio2_mini",
)  #: names that `published` knows


def published(name: str) -> Architecture:
    """Return a published model's architecture. Raises CordError for an unknown name."""
    known = {
        "audio_flamingo_3": _audio_flamingo_3,
        "qwen2_5_omni_7b": _qwen2_5_omni_7b,
        "qwen2_audio_7b": _qwen2_audio_7b,
        "qwen3_omni_30b_a3b": _qwen3_omni_30b_a3b,
        "step_audio2_mini": _step_audio2_mini,
    }
    if name not in known:
        raise CordError(f"unknown model {name!r}; choose one of {', '.join(known)}, or give a checkpoint's directory")
    return known[name]()


def _audio_flamingo_3() -> Architecture:
    from megatron_cord.model import architecture as a

    return a.Architecture(
        model_type="audioflamingo3",
        encoder=a.EncoderArchitecture(
            num_mels=128, hidden_size=1280, num_layers=32, num_heads=20, ffn_hidden_size=5120, max_positions=1500
        ),
        language=a.LanguageArchitecture(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            ffn_hidden_size=18944,
            vocab_size=151672,
            max_positions=32768,
            rope_theta=1000000.0,
            norm_epsilon=1e-6,
            qkv_bias=True,
            tied_embeddings=False,
        ),
        audio_token_id=151669,
        adapter=a.AdapterArchitecture("stacking", 3584),
    )


def _qwen2_5_omni_7b() -> Architecture:
    from megatron_cord.model import architecture as a

    return a.Architecture(
        model_type="qwen2_5_omni",
        encoder=a.EncoderArchitecture(
            num_mels=128,
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            ffn_hidden_size=5120,
            max_positions=1500,
            clip_frames=30_000,
            chunks=a.ChunkArchitecture(frames=200, attended=1),
        ),
        language=a.LanguageArchitecture(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            ffn_hidden_size=18944,
            vocab_size=152064,
            max_positions=32768,
            rope_theta=1000000.0,
            norm_epsilon=1e-6,
            qkv_bias=True,
            tied_embeddings=False,
        ),
        audio_token_id=151646,
        adapter=a.AdapterArchitecture("linear"),
        refused_tokens=((151655, "an image"), (151656, "a video")),
    )


def _qwen2_audio_7b() -> Architecture:
    from megatron_cord.model import architecture as a

    return a.Architecture(
        model_type="qwen2_audio",
        encoder=a.EncoderArchitecture(
            num_mels=128, hidden_size=1280, num_layers=32, num_heads=20, ffn_hidden_size=5120, max_positions=1500
        ),
        language=a.LanguageArchitecture(
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            ffn_hidden_size=11008,
            vocab_size=156032,
            max_positions=8192,
            rope_theta=10000.0,
            norm_epsilon=1e-5,
            qkv_bias=True,
            tied_embeddings=False,
        ),
        audio_token_id=151646,
        adapter=a.AdapterArchitecture("linear"),
    )


def _qwen3_omni_30b_a3b() -> Architecture:
    from megatron_cord.model import architecture as a

    return a.Architecture(
        model_type="qwen3_omni_moe",
        encoder=a.EncoderArchitecture(
            num_mels=128,
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            ffn_hidden_size=5120,
            max_positions=1500,
            pooling=1,
            clip_frames=240_000,
            key_bias=True,
            chunks=a.ChunkArchitecture(frames=100, attended=8, channels=480),
        ),
        language=a.LanguageArchitecture(
            hidden_size=2048,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            ffn_hidden_size=768,
            vocab_size=152064,
            max_positions=65536,
            rope_theta=1000000.0,
            norm_epsilon=1e-6,
            qkv_bias=False,
            tied_embeddings=False,
            qk_norm=True,
            experts=a.ExpertsArchitecture(count=128, per_token=8, normalized=True),
        ),
        audio_token_id=151675,
        adapter=a.AdapterArchitecture("stacking", 1280),
        refused_tokens=((151655, "an image"), (151656, "a video")),
    )


def _step_audio2_mini() -> Architecture:
    from megatron_cord.model import architecture as a

    return a.Architecture(
        model_type="step_audio_2",
        encoder=a.EncoderArchitecture(
            num_mels=128,
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            ffn_hidden_size=5120,
            max_positions=1500,
            tail_frames=2,
            clip_frames=2500,
        ),
        language=a.LanguageArchitecture(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            ffn_hidden_size=18944,
            vocab_size=158720,
            max_positions=16384,
            rope_theta=1000000.0,
            norm_epsilon=1e-6,
            qkv_bias=True,
            tied_embeddings=False,
        ),
        audio_token_id=151690,
        adapter=a.AdapterArchitecture("convolution", 2048, stride=2, kernel_size=3, activation="relu"),
    )
