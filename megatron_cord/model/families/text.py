"""Plain text models, for teachers and judges: the decoders of `decoder.py`, by themselves."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import decoder_architecture, decoder_rules
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of a text model's checkpoint from its Hugging Face configuration."""
    return Architecture(
        model_type=config.model_type,
        encoder=None,
        language=decoder_architecture(config),
        audio_token_id=None,
        adapter=None,
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole model."""
    return TensorMap(decoder_rules(arch.language, "model", "lm_head.weight"))


FAMILIES = tuple(
    Family(model_type, architecture, tensor_map, plain_class=f"transformers.{kind}ForCausalLM", sglang_max_clips=0)
    for model_type, kind in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("qwen2", "Qwen2"),
        ("qwen2_moe", "Qwen2Moe"),
        ("qwen3", "Qwen3"),
        ("qwen3_moe", "Qwen3Moe"),
    )
)
