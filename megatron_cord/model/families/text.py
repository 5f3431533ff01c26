"""Plain text models, Qwen2 and Llama, for teachers and judges. They differ in the biases of the fused projection."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.parts import decoder_architecture, decoder_rules
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of a Qwen2 or Llama checkpoint from its Hugging Face configuration."""
    return Architecture(
        model_type=config.model_type,
        encoder=None,
        language=decoder_architecture(config, qkv_bias=config.model_type == "qwen2"),
        audio_token_id=None,
        adapter=None,
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole model."""
    return TensorMap(decoder_rules(arch.language, "model", "lm_head.weight"))


FAMILIES = (
    Family("qwen2", architecture, tensor_map, plain_class="transformers.Qwen2ForCausalLM", sglang_max_clips=0),
    Family("llama", architecture, tensor_map, plain_class="transformers.LlamaForCausalLM", sglang_max_clips=0),
)
