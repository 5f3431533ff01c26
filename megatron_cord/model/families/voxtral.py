"""Voxtral (Liu et al. 2025): Whisper's encoder over whole windows, an MLP over stacks of four frames, and Llama."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_cord.model.architecture import AdapterArchitecture, Architecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import encoder_rules, pair, require, whisper_encoder
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of a Voxtral checkpoint from its Hugging Face configuration."""
    audio, text = config.audio_config, config.text_config
    require({"text_config.model_type": (text.model_type, "llama")})
    language = decoder_architecture(text, where="text_config.")
    stride, rest = divmod(audio.intermediate_size, audio.hidden_size)
    require(
        {
            "audio_config.activation_function": (audio.activation_function, "gelu"),
            "projector_hidden_act": (config.projector_hidden_act, "gelu"),
            "the remainder of audio_config.intermediate_size by hidden_size": (rest, 0),
            "the remainder of audio_config.max_source_positions by the frames of a stack": (
                audio.max_source_positions % stride,
                0,
            ),
        }
    )
    return Architecture(
        model_type="voxtral",
        encoder=whisper_encoder(
            audio,
            pooling=1,
            encodes_padding=True,
        ),
        language=language,
        audio_token_id=config.audio_token_id,
        adapter=AdapterArchitecture("stacking", language.hidden_size, stride=stride, bias=False),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    return TensorMap(
        [
            *encoder_rules(arch.encoder, "audio_tower"),
            *pair("adapter.linear1", "multi_modal_projector.linear_1", bias=False),
            *pair("adapter.linear2", "multi_modal_projector.linear_2", bias=False),
            *decoder_rules(arch.language, "language_model.model", "language_model.lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "voxtral",
        architecture,
        tensor_map,
        plain_class="transformers.VoxtralForConditionalGeneration",
        joins_windows=True,
        sglang_max_clips=math.inf,
        sglang_takes_ids=True,
    ),
)
