"""Ultravox (fixie.ai, version 0.5 and later): Whisper's encoder at a clip's own length, stacked frames, SwiGLU, an LLM.

transformers has no class for it. Names, order of the projector's parts and the place of its norms are those of the
published files. `cord graft` makes such a checkpoint of a text model and a Whisper.

Simplifications: a clip is computed as if it were alone in its batch, whatever it is padded to, and silence follows it
in the features of its last frames, where the published processing reflects the recording's end. Published checkpoints
that leave the language model or the encoder to another repository (text_model_id, audio_model_id) are refused.
"""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_cord.model.architecture import AdapterArchitecture, Architecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import DENSE, decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import encoder_rules, pair, require, whisper_encoder
from megatron_cord.model.families.ultravox.configuration import UltravoxConfig
from megatron_cord.model.tensor_map import TensorMap


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of an Ultravox checkpoint from its configuration."""
    audio, text = config.audio_config, config.text_config
    require(
        {
            **{name: (getattr(config, name, None), None) for name in ("text_model_id", "audio_model_id")},
            "audio_latency_block_size": (getattr(config, "audio_latency_block_size", None), None),
            "num_projector_layers": (getattr(config, "num_projector_layers", 0), 0),
            "projector_act": (config.projector_act, "swiglu"),
            "projector_ln_mid": (config.projector_ln_mid, True),
            "the remainder of hidden_size by 2": (config.hidden_size % 2, 0),
            "audio_config.activation_function": (audio.activation_function, "gelu"),
            "audio_config.scale_embedding": (audio.scale_embedding, False),
        }
    )
    if text.model_type not in DENSE:
        require({"text_config.model_type": (text.model_type, " or ".join(DENSE))})
    return Architecture(
        model_type=UltravoxConfig.model_type,
        encoder=whisper_encoder(
            audio,
            pooling=1,
            tail_frames=0,
        ),
        language=decoder_architecture(text, where="text_config."),
        audio_token_id=config.audio_token_index,
        adapter=AdapterArchitecture("gated_stacking", config.hidden_size // 2, stride=config.stack_factor, bias=False),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return published names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    projector = {"norm_in": "ln_pre", "linear1": "linear_1", "norm_mid": "ln_mid", "linear2": "linear_2"}
    return TensorMap(
        [
            *encoder_rules(arch.encoder, "audio_tower"),
            *(
                rule
                for megatron, hf in projector.items()
                for rule in pair(f"adapter.{megatron}", f"multi_modal_projector.{hf}", bias=False)
            ),
            *decoder_rules(arch.language, "language_model.model", "language_model.lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        UltravoxConfig.model_type,
        architecture,
        tensor_map,
        plain_class="megatron_cord.model.families.ultravox.plain_model.Ultravox",
        joins_windows=True,
        sglang_max_clips=math.inf,
        sglang_takes_ids=True,
    ),
)
