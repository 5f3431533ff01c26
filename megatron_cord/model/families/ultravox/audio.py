"""The parts of Ultravox before its language model, in plain torch: Whisper's encoder at a clip's length, the projector.

SGLang's processes load this file, too (``rollout/sglang/plugin/external``), so it imports nothing of the project.
Legend: T positions of one clip, D the encoder's width, H the language model's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu


class Projector(nn.Module):
    """Stacked frames, RMSNorm, SwiGLU, RMSNorm, a projection. What the last stack lacks is zero.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: Any) -> None:
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


def encode_clip(tower: Any, features: Tensor, num_frames: int) -> Tensor:
    """Return what transformers' Whisper encoder makes of one clip alone, [T, D].

    Args:
        tower: the encoder.
        features: [mels, at least num_frames]; what follows the clip's own frames is not read.
        num_frames: the clip's own.
    """
    x = gelu(tower.conv1(features[None, :, :num_frames].to(tower.conv1.weight)))
    x = gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.embed_positions.weight[: x.shape[1]]
    for layer in tower.layers:
        x = layer(x, None)
    encoded: Tensor = tower.layer_norm(x)[0]
    return encoded
