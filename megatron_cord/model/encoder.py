"""The audio tower: a Whisper-style encoder on Megatron's tensor-parallel layers, and the adapter into the language model.

Simplification: clips are padded to the encoder's whole window, as the published models expect.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_cord.model.architecture import EncoderArchitecture
from megatron_cord.model.transformer import block_spec, encoder_config
from megatron_cord.parallel.layout import Layout


class AudioEncoder(MegatronModule):
    """Log-mel features to one hidden vector every 40 ms (for Whisper's 10 ms hop). All of it is on the first pipeline stage."""

    def __init__(self, arch: EncoderArchitecture, layout: Layout, dtype: torch.dtype) -> None:
        config = encoder_config(arch, layout.config, dtype)
        super().__init__(config)
        self.arch = arch
        hidden = arch.hidden_size
        self.conv1 = torch.nn.Conv1d(arch.num_mels, hidden, kernel_size=3, padding=1, dtype=dtype, device=layout.device)
        self.conv2 = torch.nn.Conv1d(hidden, hidden, kernel_size=3, stride=2, padding=1, dtype=dtype, device=layout.device)
        positions = torch.empty(arch.max_positions, hidden, dtype=dtype, device=layout.device)
        self.embed_positions = torch.nn.Parameter(positions, requires_grad=False)  # sinusoids, stored in the checkpoint
        groups = copy.copy(layout.groups)
        groups.pp = layout.solo  # this block is whole here, whatever the language model's stages
        self.block = TransformerBlock(config, block_spec(config, causal=False), post_layer_norm=False, pg_collection=groups)
        self.layer_norm = torch.nn.LayerNorm(hidden, eps=config.layernorm_epsilon, dtype=dtype, device=layout.device)
        for layer in self.block.layers:
            _keep_key_bias_zero(layer.self_attention.linear_qkv.bias, hidden // arch.num_heads)

    def forward(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """Encodes clips.

        Args:
            features: [C, mels, frames], C clips padded to the window.
            num_frames: [C] int64, the valid frames of each clip.

        Returns:
            [C, frames / 4, H_audio]; only the first `EncoderArchitecture.num_tokens` of each clip mean something.
        """
        x = torch.nn.functional.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = torch.nn.functional.gelu(self.conv2(x))  # [C, H, T]
        x = x.permute(2, 0, 1) + self.embed_positions[:, None]  # [T, C, H]
        valid = self.arch.frames_after_convolutions(num_frames)
        is_padding = torch.arange(x.shape[0], device=x.device)[None] >= valid[:, None]
        x = self.block(x.contiguous(), attention_mask=is_padding[:, None, None, :])
        x = torch.nn.functional.avg_pool1d(x.permute(1, 2, 0), kernel_size=2, stride=2)  # [C, H, T/2]
        return self.layer_norm(x.transpose(1, 2))


def _keep_key_bias_zero(bias: torch.nn.Parameter, head_dim: int) -> None:
    """Whisper's keys have no bias, Megatron's fused projection has one: its gradient is dropped, so that it stays the zero it was loaded as.

    A key bias does not change the attention, so its gradient is rounding noise, which Adam would scale up to whole steps.
    bias: [3 · D · heads / TP], for each head its query, key and value part.
    """
    mask = torch.ones(3, head_dim, device=bias.device, dtype=bias.dtype)
    mask[1] = 0
    bias.register_hook(lambda grad: (grad.view(-1, 3, head_dim) * mask).view(-1))


class LinearAdapter(MegatronModule):
    """Qwen2-Audio's adapter: one linear projection into the language model's width."""

    def __init__(self, arch: EncoderArchitecture, hidden_size: int, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__(encoder_config(arch, layout.config, dtype))
        self.linear = torch.nn.Linear(arch.hidden_size, hidden_size, dtype=dtype, device=layout.device)

    def forward(self, features: Tensor) -> Tensor:
        """[C, T, H_audio] to [C, T, H]."""
        return self.linear(features)
