"""Qwen2-Audio (Chu et al. 2024): Whisper's encoder, average pooling by two, one linear projection, Qwen2.

The class in transformers takes any text model, and so does this family: those of `decoder.py`.
"""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_cord.model.architecture import AdapterArchitecture, Architecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import encoder_rules, pair, require, whisper_encoder
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of a Qwen2-Audio checkpoint from its Hugging Face configuration."""
    audio, text = config.audio_config, config.text_config
    language = decoder_architecture(text, where="text_config.")
    require({"audio_config.activation_function": (audio.activation_function, "gelu")})
    return Architecture(
        model_type="qwen2_audio",
        encoder=whisper_encoder(audio),
        language=language,
        audio_token_id=config.audio_token_id,
        adapter=AdapterArchitecture("linear"),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    return TensorMap(
        [
            *encoder_rules(arch.encoder, "audio_tower"),
            *pair("adapter.linear", "multi_modal_projector.linear"),
            *decoder_rules(arch.language, "language_model.model", "language_model.lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "qwen2_audio",
        architecture,
        tensor_map,
        plain_class="transformers.Qwen2AudioForConditionalGeneration",
        sglang_max_clips=math.inf,
    ),
)
