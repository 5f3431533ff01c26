"""The parts that Step-Audio 2 has to itself, in plain torch under the published names: configuration, encoder, adapter.

Written from the published description and the names in the checkpoint's files; no code of the checkpoint is run. Each
clip is encoded alone, with the two frames of silence that end it and nothing behind them. SGLang's processes load this
file, too (``rollout/sglang/plugin/external``), so it imports nothing of the project. Legend: T positions of one clip, D
the encoder's width, H the language model's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import AutoConfig, PretrainedConfig, Qwen2Config

AUDIO_TOKEN_ID = 151690  #: <audio_patch> in the published vocabulary; the configuration has no field for it
ADAPTER_HIDDEN_SIZE = 2048  #: nor for the width of the adapter's MLP
TAIL_FRAMES = 2  #: of silence that end a clip: convolutions see them, attention does not
CLIP_FRAMES = 2500  #: the published processing cuts audio into 25 s


class StepAudio2Config(PretrainedConfig):  # type: ignore[misc]
    """The fields of config.json, so that transformers can read it without remote code."""

    model_type = "step_audio_2"

    def __init__(
        self,
        audio_encoder_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.audio_encoder_config = audio_encoder_config or {}
        self.text_config = Qwen2Config(
            **{key: value for key, value in (text_config or {}).items() if key != "model_type"}
        )
        super().__init__(**fields)

    @property
    def audio(self) -> SimpleNamespace:
        """The encoder's and the adapter's sizes, as attributes."""
        return SimpleNamespace(**self.audio_encoder_config)

    @property
    def window_frames(self) -> int:
        """Log-mel frames that the encoder has positions for."""
        return 2 * int(self.audio.n_audio_ctx)

    @property
    def clip_frames(self) -> int:
        """Log-mel frames of the longest clip."""
        return min(CLIP_FRAMES, self.window_frames - TAIL_FRAMES)

    @property
    def placeholder(self) -> int:
        """The token that stands for each of a clip's."""
        return int(getattr(self, "audio_token_id", AUDIO_TOKEN_ID))

    def num_tokens(self, num_frames: int) -> int:
        """Return how many tokens a clip of so many log-mel frames becomes."""
        return (_positions(num_frames) // 2 + 2 - int(self.audio.kernel_size)) // int(self.audio.adapter_stride) + 1


AutoConfig.register(StepAudio2Config.model_type, StepAudio2Config)


class Encoder(nn.Module):
    """Log-mel frames to features at a quarter of their rate.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: StepAudio2Config) -> None:
        super().__init__()
        audio = config.audio
        self.conv1 = nn.Conv1d(audio.n_mels, audio.n_audio_state, 3, padding=1)
        self.conv2 = nn.Conv1d(audio.n_audio_state, audio.n_audio_state, 3, stride=2, padding=1)
        self.positional_embedding = nn.Embedding(audio.n_audio_ctx, audio.n_audio_state).requires_grad_(False)
        self.blocks = nn.ModuleList(_Block(audio.n_audio_state, audio.n_audio_head) for _ in range(audio.n_audio_layer))
        self.after_norm = nn.LayerNorm(audio.n_audio_state)

    def forward(self, features: Tensor, num_frames: int) -> Tensor:
        """Encode one clip [mels, at least num_frames + 2] to [T / 2, D], what ends it included."""
        clip = features[:, : num_frames + TAIL_FRAMES].to(self.conv1.weight)
        x = gelu(self.conv2(gelu(self.conv1(clip[None]))))[0].T
        x = x + self.positional_embedding.weight[: len(x)]
        is_audio = torch.arange(len(x), device=x.device) < _positions(num_frames)
        for block in self.blocks:
            x = block(x, is_audio)
        pooled: Tensor = self.after_norm(x[: len(x) // 2 * 2].reshape(-1, 2, x.shape[-1]).mean(1))
        return pooled


class Adapter(nn.Module):
    """The encoder's features to tokens of the language model's width, at half of their rate.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: StepAudio2Config) -> None:
        super().__init__()
        audio = config.audio
        self.conv = nn.Conv1d(
            audio.n_audio_state, audio.n_audio_state, audio.kernel_size, stride=audio.adapter_stride, padding=1
        )
        self.linear1 = nn.Linear(audio.n_audio_state, ADAPTER_HIDDEN_SIZE)
        self.linear2 = nn.Linear(ADAPTER_HIDDEN_SIZE, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Map one clip [T / 2, D] to [T / 4, H]."""
        tokens: Tensor = self.linear2(self.linear1(gelu(self.conv(features.T[None]))[0].T).relu())
        return tokens


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.Module()
        for part in ("query", "key", "value", "out"):
            setattr(self.attn, part, nn.Linear(width, width, bias=part != "key"))
        self.attn_ln, self.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, is_audio: Tensor) -> Tensor:
        """Map [T, D] to the same; no position attends to those that is_audio [T] excludes."""
        attn: Any = self.attn
        normed = self.attn_ln(x)
        q, k, v = (
            part(normed).unflatten(1, (self.heads, -1)).transpose(0, 1) for part in (attn.query, attn.key, attn.value)
        )
        values = scaled_dot_product_attention(q, k, v, is_audio.expand(len(x), -1)).transpose(0, 1).flatten(1)
        x = x + attn.out(values)
        out: Tensor = x + self.mlp(self.mlp_ln(x))
        return out


def _positions(num_frames: int) -> int:
    """Return how many of the encoder's positions carry audio when so many of its frames do."""
    return (num_frames - 1) // 2 + 1
