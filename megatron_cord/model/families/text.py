"""Plain text models, Qwen2 and Llama: a teacher or a judge that reads. They differ in the biases of the fused projection alone."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families.parts import decoder_architecture, decoder_rules
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Sizes of a Qwen2 or Llama checkpoint from its Hugging Face configuration.

    Raises:
        CordError: a setting under which the model would compute something else.
    """
    language = decoder_architecture(config, qkv_bias=config.model_type == "qwen2")
    return Architecture(
        model_type=config.model_type, encoder=None, language=language, audio_token_id=None, adapter=None
    )


def canonical_name(name: str) -> str:
    """The name as published, which every version of transformers writes."""
    return name


def tensor_map(arch: Architecture) -> TensorMap:
    """Hugging Face names against Megatron names and layouts, for the whole model."""
    return TensorMap(decoder_rules(arch.language, "model", "lm_head.weight"))
