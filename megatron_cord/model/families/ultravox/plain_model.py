"""Ultravox in plain torch under its published names, for generation and comparison; transformers lacks it.

Whisper's layers and the language model are transformers' own. Each clip is encoded alone, at its own length, so that
nothing is masked. Legend: C clips, B sequences, S tokens, T positions of one clip, D the encoder's width, H the
language model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from megatron_cord.model.families.plain_clips import place_clips
from megatron_cord.model.families.ultravox.configuration import UltravoxConfig


class Projector(nn.Module):
    """Stacked frames, RMSNorm, SwiGLU, RMSNorm, a projection. What the last stack lacks is zero.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: UltravoxConfig) -> None:
        super().__init__()
        self.stack_factor = config.stack_factor
        width, middle = config.audio_config.d_model * config.stack_factor, config.hidden_size // 2
        self.ln_pre = nn.RMSNorm(width, eps=1e-6)
        self.linear_1 = nn.Linear(width, config.hidden_size, bias=False)
        self.ln_mid = nn.RMSNorm(middle, eps=1e-6)
        self.linear_2 = nn.Linear(middle, config.text_config.hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map one clip [T, D] to [T / stack_factor, H], rounded up."""
        whole = pad(features, (0, 0, 0, -len(features) % self.stack_factor))
        values, gate = self.linear_1(self.ln_pre(whole.view(-1, self.linear_1.in_features))).chunk(2, dim=-1)
        tokens: Tensor = self.linear_2(self.ln_mid(silu(gate) * values))
        return tokens


class Ultravox(PreTrainedModel):
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
        self.post_init()  # type: ignore[no-untyped-call]

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
        tower = self.audio_tower
        x = gelu(tower.conv1(features[None, :, :num_frames].to(tower.conv1.weight)))
        x = gelu(tower.conv2(x)).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        for layer in tower.layers:
            x = layer(x, None)
        tokens: Tensor = self.multi_modal_projector(tower.layer_norm(x)[0])
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
