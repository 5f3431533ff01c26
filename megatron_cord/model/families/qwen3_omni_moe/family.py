"""Qwen3-Omni with experts (Xu et al. 2025), audio and text alone: the thinker without its vision tower.

Its encoder takes clips of any length in chunks of a second, a two-layer MLP leads to a Qwen3 with experts. The
talker, code2wav and the vision tower (visual) are not trained: conversions carry their tensors.

Rotary positions have three axes, time, height and width, which only images tell apart: text and audio have the same
number on all three, whichever axis a pair of dimensions turns by. So the ordinary rotation is exact here, and
placeholders of images and videos are refused.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from megatron_cord.model.architecture import (
    AdapterArchitecture,
    Architecture,
    ChunkArchitecture,
)
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import WHISPER_SPELLING, encoder_rules, pair, require, whisper_encoder
from megatron_cord.model.tensor_map import TensorMap

#: Forty minutes of log-mel frames, the longest recording that is published to be understood.
MAX_CLIP_FRAMES = 240_000
#: transformers counts the positions of a clip with this number of frames a chunk, whatever the configuration has.
_CHUNK_FRAMES = 100


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of the thinker of a checkpoint from its Hugging Face configuration."""
    thinker: Any = config.thinker_config
    audio, text = thinker.audio_config, thinker.text_config
    where = "thinker_config."
    language = decoder_architecture(text, where=f"{where}text_config.")
    require(
        {
            f"{where}audio_config.activation_function": (audio.activation_function, "gelu"),
            f"{where}audio_config.scale_embedding": (audio.scale_embedding, False),
            f"{where}audio_config.n_window": (audio.n_window, _CHUNK_FRAMES // 2),
            f"the remainder of {where}audio_config.n_window_infer by {_CHUNK_FRAMES}": (
                audio.n_window_infer % _CHUNK_FRAMES,
                0,
            ),
            f"{where}audio_config.output_dim": (audio.output_dim, language.hidden_size),
        }
    )
    return Architecture(
        model_type="qwen3_omni_moe",
        encoder=whisper_encoder(
            audio,
            pooling=1,
            clip_frames=MAX_CLIP_FRAMES,
            key_bias=True,
            chunks=ChunkArchitecture(
                _CHUNK_FRAMES, audio.n_window_infer // _CHUNK_FRAMES, audio.downsample_hidden_size
            ),
        ),
        language=language,
        audio_token_id=thinker.audio_token_id,
        adapter=AdapterArchitecture("stacking", audio.d_model),
        refused_tokens=((thinker.image_token_id, "an image"), (thinker.video_token_id, "a video")),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole thinker without its vision tower."""
    assert arch.encoder is not None
    tower = "thinker.audio_tower"
    return TensorMap(
        [
            *encoder_rules(arch.encoder, tower, WHISPER_SPELLING | {"final_norm": "ln_post"}),
            *pair("adapter.linear1", f"{tower}.proj1"),
            *pair("adapter.linear2", f"{tower}.proj2"),
            *decoder_rules(arch.language, "thinker.model", "thinker.lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "qwen3_omni_moe",
        architecture,
        tensor_map,
        plain_class="megatron_cord.model.families.qwen3_omni_moe.plain_model.Thinker",
        carries=("thinker.visual.", "talker.", "code2wav."),
        pads_to_longest=True,
        sees=True,
        sglang_max_clips=math.inf,
    ),
)
