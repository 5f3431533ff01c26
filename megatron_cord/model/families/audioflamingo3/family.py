"""Audio Flamingo 3 (Goel et al. 2025): Whisper's encoder over windows, average pooling by two, an MLP and Qwen2.

A recording is cut into windows of 30 s, whose tokens stand in the prompt as those of one recording.
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
    """Return the sizes of an Audio Flamingo 3 from its Hugging Face configuration."""
    audio, text = config.audio_config, config.text_config
    require(
        {
            "audio_config.activation_function": (audio.activation_function, "gelu"),
            "projector_hidden_act": (config.projector_hidden_act, "gelu"),
            "text_config.model_type": (text.model_type, "qwen2"),
            # transformers' class has an output layer of its own in either case
            "text_config.tie_word_embeddings": (text.tie_word_embeddings, False),
        }
    )
    language = decoder_architecture(text, where="text_config.")
    return Architecture(
        model_type="audioflamingo3",
        encoder=whisper_encoder(audio),
        language=language,
        audio_token_id=config.audio_token_id,
        adapter=AdapterArchitecture("stacking", language.hidden_size, bias=bool(config.projector_bias)),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    assert arch.adapter is not None
    bias = arch.adapter.bias
    return TensorMap(
        [
            *encoder_rules(arch.encoder, "audio_tower"),
            *pair("adapter.linear1", "multi_modal_projector.linear_1", bias=bias),
            *pair("adapter.linear2", "multi_modal_projector.linear_2", bias=bias),
            *decoder_rules(arch.language, "language_model.model", "language_model.lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "audioflamingo3",
        architecture,
        tensor_map,
        plain_class="transformers.AudioFlamingo3ForConditionalGeneration",
        joins_windows=True,
        longest_seconds=600,  # of which transformers' processor takes the beginning
        sglang_max_clips=math.inf,
        sglang_takes_ids=True,
    ),
)
