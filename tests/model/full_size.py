"""Checkpoints with the shapes of the published models and no weights: a header before a hole of the right length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from examples.quickstart.checkpoint import published_name
from megatron_cord.convert.hf.writer import Shard, plan_shards
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.model.families.step_audio_2.audio import StepAudio2Config
from megatron_cord.model.families.step_audio_2.plain_model import StepAudio2
from tests.model.family_reference import AS_QWEN2_AUDIO

ENCODER = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 156032,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
}
STEP_ENCODER = {
    "n_mels": 128,
    "n_audio_ctx": 1500,
    "n_audio_state": 1280,
    "n_audio_head": 20,
    "n_audio_layer": 32,
    "llm_dim": 3584,
    "kernel_size": 3,
    "adapter_stride": 2,
}
STEP_TEXT = {
    "vocab_size": 158720,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
#: Llama-3.1-8B, Mistral-7B-v0.3, Qwen1.5-MoE-A2.7B, Qwen3-8B and Qwen3-30B-A3B.
TEXT: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "mistral": {
        "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": None,
    },
    "qwen2_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "use_sliding_window": False, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None, "use_sliding_window": False,
    },
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None, "use_sliding_window": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


_ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
#: Qwen2.5-Omni of 7B and 3B, where they are not transformers' defaults: widths of the thinker, and the talker.
OMNI: dict[str, dict[str, Any]] = {
    "qwen2_5_omni": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "qwen2_5_omni_3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
TALKERS = {
    "qwen2_5_omni": {
        "hidden_size": 896, "intermediate_size": 18944, "num_hidden_layers": 24, "num_attention_heads": 12,
        "num_key_value_heads": 4, "embedding_size": 3584,
    },
    "qwen2_5_omni_3b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "head_dim": 64, "embedding_size": 2048,
    },
}  # fmt: skip


def omni_config(family: str) -> Any:
    """Return the configuration of a published Qwen2.5-Omni."""
    text, talker = OMNI[family], TALKERS[family]
    thinker = {
        "audio_config": {"output_dim": text["hidden_size"]},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": text["hidden_size"]},
        "text_config": text | {"rope_parameters": _ROPE},
    }
    return Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker | {"rope_parameters": _ROPE})


#: Audio Flamingo 3, where it does not have transformers' defaults.
FLAMINGO_TEXT = {
    "model_type": "qwen2", "vocab_size": 151672, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip


def full_size_config(family: str) -> Any:
    """Return the sizes of a family's published model."""
    if family in TEXT:
        return AutoConfig.for_model(family, **TEXT[family])
    if family in OMNI:
        return omni_config(family)
    if family == "audioflamingo3":
        return AudioFlamingo3Config(text_config=FLAMINGO_TEXT)
    if family == "qwen2_audio":
        return Qwen2AudioConfig(audio_config=ENCODER, text_config=QWEN2, audio_token_index=151646)
    return StepAudio2Config(audio_encoder_config=STEP_ENCODER, text_config=STEP_TEXT)


def full_size_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its published name, from a model without memory."""
    kinds: dict[str, Any] = {
        "audioflamingo3": AudioFlamingo3ForConditionalGeneration,
        "qwen2_audio": Qwen2AudioForConditionalGeneration,
        "step_audio_2": StepAudio2,
    }
    kinds |= dict.fromkeys(OMNI, Qwen2_5OmniForConditionalGeneration)
    with torch.device("meta"):
        model = kinds.get(family, AutoModelForCausalLM.from_config)(full_size_config(family))
    name_of = published_name if family in AS_QWEN2_AUDIO else str
    named = ((name_of(name), parameter.detach()) for name, parameter in model.named_parameters())
    return {name: tuple(part.shape) for whole in named for name, part in published_parts(*whole)}


def write_full_size(directory: Path, family: str, max_bytes: int = 10**12) -> dict[str, tuple[int, ...]]:
    """Write configuration and sparse bfloat16 files of at most max_bytes each; return the shapes."""
    shapes = full_size_shapes(family)
    if family in AS_QWEN2_AUDIO or family in OMNI:
        full_size_config(family).save_pretrained(directory)
    else:
        audio = {"audio_encoder_config": STEP_ENCODER, "text_config": STEP_TEXT}
        (directory / "config.json").write_text(json.dumps({"model_type": family} | TEXT.get(family, audio)))
    shards: list[Shard] = plan_shards(shapes, torch.bfloat16, max_bytes)
    for shard in shards:
        header = shard.header(torch.bfloat16)
        with (directory / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes(torch.bfloat16))
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": {name: shard.file for shard in shards for name in shard.shapes}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return shapes
