"""Step-Audio 2 in plain torch under its published names, for generation and comparison; transformers lacks it.

Legend: C clips, B sequences, S tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Model

from megatron_cord.model.families.plain_clips import place_clips
from megatron_cord.model.families.step_audio_2.audio import Adapter, Encoder, StepAudio2Config


class StepAudio2(PreTrainedModel):  # type: ignore[misc]
    """Encoder, adapter and Qwen2 with its head.

    Args:
        config: of the checkpoint.
    """

    config_class = StepAudio2Config
    _supports_sdpa = True

    def __init__(self, config: StepAudio2Config) -> None:
        super().__init__(config)
        self.encoder, self.adapter = Encoder(config), Adapter(config)
        self.model = Qwen2Model(config.text_config)
        self.lm_head: nn.Linear = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def encode_audio(self, features: Tensor, num_frames: int) -> Tensor:
        """Encode one clip [mels, at least num_frames + 2] to tokens [tokens, H]."""
        tokens: Tensor = self.adapter(self.encoder(features, num_frames))
        return tokens[: self.config.num_tokens(num_frames)]

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
            settings: attention_mask, position_ids, past_key_values and use_cache of Qwen2.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if input_features is not None and feature_attention_mask is not None:
            is_placeholder = torch.eq(input_ids, self.config.placeholder)
            embedded = place_clips(embedded, is_placeholder, input_features, feature_attention_mask, self.encode_audio)
        return self.model(inputs_embeds=embedded, **settings)
