"""Step-Audio 2 as a plain torch model under its published names, for generation and comparison: transformers has no class for it.

Written from the published description and the names in the checkpoint's files, on transformers' Qwen2; no code of the checkpoint is run. Each
clip is heard alone, with the two frames of silence that end it and nothing behind them.
Legend: C clips, T positions of one clip, D its width, B sequences, S tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Model

from megatron_cord.model.architecture import EncoderArchitecture
from megatron_cord.model.families.step_audio_2 import StepAudio2Config, architecture


class StepAudio2(PreTrainedModel):
    """Encoder, adapter and Qwen2 with its head.

    Args:
        config: of the checkpoint.
    """

    config_class = StepAudio2Config
    _supports_sdpa = True

    def __init__(self, config: StepAudio2Config) -> None:
        super().__init__(config)
        self.arch = architecture(config)
        encoder, adapter, hidden = self.arch.encoder, self.arch.adapter, self.arch.language.hidden_size
        assert encoder is not None and adapter is not None
        width = encoder.hidden_size
        self.encoder = _Encoder(encoder)
        self.adapter = nn.Module()
        self.adapter.conv = nn.Conv1d(width, width, adapter.kernel_size, stride=adapter.stride, padding=1)
        self.adapter.linear1 = nn.Linear(width, adapter.hidden_size)
        self.adapter.linear2 = nn.Linear(adapter.hidden_size, hidden)
        self.model = Qwen2Model(config.text_config)
        self.lm_head = nn.Linear(hidden, self.arch.language.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def hear(self, features: Tensor, num_frames: int) -> Tensor:
        """One clip [mels, at least num_frames + 2] to tokens [tokens, H]."""
        x = self.encoder(features, num_frames)
        adapter: Any = self.adapter
        x = torch.nn.functional.gelu(adapter.conv(x.T[None]))[0].T
        x = adapter.linear2(adapter.linear1(x).relu())
        return x[: self.arch.num_audio_tokens(num_frames)]

    def hidden(
        self, input_ids: Tensor, input_features: Tensor | None = None, feature_attention_mask: Tensor | None = None, **settings: Any
    ) -> Any:
        """Hidden states of a batch, as transformers' models return them.

        Args:
            input_ids: int64 [B, S], with one placeholder for each token of a clip.
            input_features: [C, mels, frames] of all clips in the batch's order; None without audio.
            feature_attention_mask: int64 [C, frames], 1 where a frame is a clip's own.
            settings: attention_mask, position_ids, past_key_values and use_cache of Qwen2.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if input_features is not None and feature_attention_mask is not None:
            lengths = feature_attention_mask.sum(1).tolist()
            heard = torch.cat([self.hear(clip, frames) for clip, frames in zip(input_features, lengths, strict=True)])
            is_placeholder = torch.eq(input_ids, self.arch.audio_token_id or 0)
            embedded = embedded.masked_scatter(is_placeholder[..., None], heard.to(embedded.dtype))
        return self.model(inputs_embeds=embedded, **settings)


class _Encoder(nn.Module):
    def __init__(self, arch: EncoderArchitecture) -> None:
        super().__init__()
        self.arch = arch
        width = arch.hidden_size
        self.conv1 = nn.Conv1d(arch.num_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Embedding(arch.max_positions, width).requires_grad_(False)
        self.blocks = nn.ModuleList(_Block(arch) for _ in range(arch.num_layers))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, num_frames: int) -> Tensor:
        """One clip [mels, frames] to features [T / 2, D]."""
        gelu, tail = torch.nn.functional.gelu, self.arch.tail_frames or 0
        clip = features[:, : num_frames + tail].to(self.conv1.weight.dtype)
        x = gelu(self.conv2(gelu(self.conv1(clip[None]))))[0].T
        x = x + self.positional_embedding.weight[: len(x)]
        is_heard = torch.arange(len(x), device=x.device) < self.arch.frames_after_convolutions(num_frames)
        for block in self.blocks:
            x = block(x, is_heard)
        return self.after_norm(x[: len(x) // 2 * 2].unflatten(0, (-1, 2)).mean(1))


class _Block(nn.Module):
    def __init__(self, arch: EncoderArchitecture) -> None:
        super().__init__()
        width, self.heads = arch.hidden_size, arch.num_heads
        self.attn = nn.Module()
        for part in ("query", "key", "value", "out"):
            setattr(self.attn, part, nn.Linear(width, width, bias=part != "key"))
        self.attn_ln, self.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, arch.ffn_hidden_size), nn.GELU(), nn.Linear(arch.ffn_hidden_size, width))

    def forward(self, x: Tensor, is_heard: Tensor) -> Tensor:
        """[T, D] to the same; positions [T] that are not heard are attended to by none."""
        attn: Any = self.attn
        normed = self.attn_ln(x)
        q, k, v = (part(normed).unflatten(1, (self.heads, -1)).transpose(0, 1) for part in (attn.query, attn.key, attn.value))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~is_heard, -torch.inf)
        x = x + attn.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return x + self.mlp(self.mlp_ln(x))
