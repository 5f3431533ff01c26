"""Qwen2.5-Omni (Xu et al. 2025), from audio and text to text: the thinker without its vision tower.

Whisper's encoder takes a clip two seconds at a time: convolutions, sinusoids and attention begin anew with each chunk,
then neighbouring positions are averaged over the whole clip, and one projection leads to a Qwen2. The speech generator
(talker, token2wav) and the vision tower (visual) are not trained: conversions carry their tensors.

Rotary positions have three axes, time, height and width, of which each turns some of the pairs of dimensions. A token's
numbers on them differ inside images and videos alone; a text or audio token has its place in the sequence on all three,
so that every pair turns by the same number, whichever axis it belongs to. The ordinary rotation is exact here, and
placeholders of images and videos are refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_cord.model.architecture import (
    AdapterArchitecture,
    Architecture,
    ChunkArchitecture,
)
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import Decoder, decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import WHISPER_SPELLING, encoder_rules, pair, require, whisper_encoder
from megatron_cord.model.tensor_map import TensorMap

#: Five minutes of log-mel frames, which is the window of the published feature extractor.
MAX_CLIP_FRAMES = 30_000
_DECODERS = {"qwen2_5_omni_text": Decoder(qkv_bias=True)}
_THINKER, _TOWER = "thinker.", "thinker.audio_tower"


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of the thinker of a checkpoint from its Hugging Face configuration."""
    thinker: Any = config.thinker_config
    audio, text = thinker.audio_config, thinker.text_config
    where = "thinker_config."
    # transformers ties by the thinker's own setting; that of its text model has no effect.
    language = replace(
        decoder_architecture(text, where=f"{where}text_config.", kinds=_DECODERS),
        tied_embeddings=bool(thinker.tie_word_embeddings),
    )
    require(
        {
            f"{where}audio_config.activation_function": (audio.activation_function, "gelu"),
            f"{where}audio_config.scale_embedding": (audio.scale_embedding, False),
            f"{where}audio_config.output_dim": (audio.output_dim, language.hidden_size),
        }
    )
    return Architecture(
        model_type="qwen2_5_omni",
        encoder=whisper_encoder(
            audio,
            clip_frames=MAX_CLIP_FRAMES,
            chunks=ChunkArchitecture(2 * audio.n_window, attended=1),
        ),
        language=language,
        audio_token_id=thinker.audio_token_id,
        adapter=AdapterArchitecture("linear"),
        refused_tokens=((thinker.image_token_id, "an image"), (thinker.video_token_id, "a video")),
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return Hugging Face names against Megatron names and layouts, for the whole thinker without its vision tower."""
    assert arch.encoder is not None
    return TensorMap(
        [
            *encoder_rules(arch.encoder, _TOWER, WHISPER_SPELLING | {"final_norm": "ln_post"}),
            *pair("adapter.linear", f"{_TOWER}.proj"),
            *decoder_rules(arch.language, f"{_THINKER}model", f"{_THINKER}lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "qwen2_5_omni",
        architecture,
        tensor_map,
        plain_class="megatron_cord.model.families.qwen2_5_omni.plain_model.Thinker",
        # The last is an embedding of the encoder's which the published model never reads.
        carries=("talker.", "token2wav.", "thinker.visual.", f"{_TOWER}.audio_bos_eos_token."),
        carries_files=("spk_dict.pt",),
        sees=True,
        sglang_max_clips=math.inf,
        sglang_takes_ids=True,
    ),
)
