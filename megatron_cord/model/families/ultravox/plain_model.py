"""Ultravox in plain torch under its published names, for generation and comparison; transformers lacks it.

Whisper's layers and the language model are transformers' own. Each clip is encoded alone, at its own length, so that
nothing is masked. Legend: C clips, B sequences, S tokens, H the language model's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from megatron_cord.model.families.plain_clips import place_clips
from megatron_cord.model.families.ultravox.audio import Projector, encode_clip
from megatron_cord.model.families.ultravox.configuration import UltravoxConfig


class Ultravox(PreTrainedModel):  # type: ignore[misc]
    """Encoder, projector and language model with its head.

    Args:
        config: of the checkpoint.
    """

    config_class = UltravoxConfig
    _supports_sdpa = True

    def __init__(self, config: UltravoxConfig) -> None:
        super().__init__(config)
        self.audio_tower: Any = WhisperEncoder(config.audio_config)
        self.multi_modal_projector = Projector(config)
        # In the precision of the whole, whatever the language model's own configuration has.
        self.language_model: Any = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        embedding: nn.Module = self.language_model.model.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        head: nn.Module = self.language_model.lm_head
        return head

    def encode_audio(self, features: Tensor, num_frames: int) -> Tensor:
        """Encode one clip [mels, at least num_frames] to tokens [tokens, H]; what follows its frames is not read."""
        tokens: Tensor = self.multi_modal_projector(encode_clip(self.audio_tower, features, num_frames))
        return tokens

    def hidden(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Return hidden states of a batch, as transformers' models do.

        Args:
            input_ids: int64 [B, S], with one placeholder for each token of a clip.
            input_features: [C, mels, frames] of all clips in the batch's order; None without audio.
            feature_attention_mask: int64 [C, frames], 1 where a frame is a clip's own.
            settings: attention_mask, position_ids, past_key_values and use_cache of the language model.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if input_features is not None and feature_attention_mask is not None:
            is_placeholder = torch.eq(input_ids, self.config.audio_token_index)
            embedded = place_clips(embedded, is_placeholder, input_features, feature_attention_mask, self.encode_audio)
        return self.language_model.model(inputs_embeds=embedded, **settings)
