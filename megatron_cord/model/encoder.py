"""The audio tower: a Whisper-style encoder on Megatron's tensor-parallel layers.

Under sequence parallelism the positions of all clips are split over the tensor-parallel ranks between the layers'
matrices; a window that they do not divide gets masked positions at its end. Simplification: clips are padded to the
encoder's whole window, as the published models expect.
Legend: C clips, T positions after the convolutions, H_audio the encoder's width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_cord.model.architecture import EncoderArchitecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.transformer import block_spec, encoder_config
from megatron_cord.parallel.layout import Layout


class AudioEncoder(MegatronModule):  # type: ignore[misc]
    """Encode log-mel features as hidden vectors, one every 40 ms for Whisper's 10 ms hop and pooling by two.

    All of it is on the first pipeline stage.

    Args:
        arch: sizes.
        layout: process groups and this rank's place.
        dtype: of parameters and activations.
        layers: how its layers are computed.
    """

    def __init__(self, arch: EncoderArchitecture, layout: Layout, dtype: torch.dtype, layers: LayerConfig) -> None:
        config = encoder_config(arch, layout.config, dtype, layers)
        super().__init__(config)
        self.arch = arch
        hidden = arch.hidden_size
        self.conv1 = torch.nn.Conv1d(arch.num_mels, hidden, kernel_size=3, padding=1, dtype=dtype, device=layout.device)
        self.conv2 = torch.nn.Conv1d(
            hidden, hidden, kernel_size=3, stride=2, padding=1, dtype=dtype, device=layout.device
        )
        positions = torch.empty(arch.max_positions, hidden, dtype=dtype, device=layout.device)
        self.embed_positions = torch.nn.Parameter(positions, requires_grad=False)  # sinusoids, stored in the checkpoint
        groups = copy.copy(layout.groups)
        groups.pp = groups.cp = layout.solo  # this block is whole here, however the language model is split
        self._tp_group = layout.tp_group
        self._padding = -arch.max_positions % layout.config.tp if config.sequence_parallel else 0
        mask = AttnMaskType.no_mask if arch.encodes_padding and not self._padding else AttnMaskType.padding
        self.block = TransformerBlock(
            config, block_spec(config, mask, layers), post_layer_norm=False, pg_collection=groups
        )
        self.layer_norm = torch.nn.LayerNorm(hidden, eps=config.layernorm_epsilon, dtype=dtype, device=layout.device)
        for layer in self.block.layers:
            _keep_key_bias_zero(layer.self_attention.linear_qkv.bias, hidden // arch.num_heads)
            layer.mlp.__class__ = WholeMLP

    def forward(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """Encode clips.

        Args:
            features: [C, mels, frames], clips padded to the window.
            num_frames: [C] int64, the valid frames of each clip.

        Returns:
            [C, frames / 2 / pooling, H_audio]; only the first `EncoderArchitecture.num_features` of each clip are
            meaningful.
        """
        end = None if self.arch.tail_frames is None else num_frames + self.arch.tail_frames
        x = _zero_from(end, features.to(self.conv1.weight.dtype))
        x = _zero_from(end, torch.nn.functional.gelu(self.conv1(x)))
        x = torch.nn.functional.gelu(self.conv2(x))  # [C, H_audio, T]
        x = x.permute(2, 0, 1) + self.embed_positions[:, None]  # [T, C, H_audio]
        x = self._layers(x, num_frames)
        x = torch.nn.functional.avg_pool1d(x.permute(1, 2, 0), kernel_size=self.arch.pooling)  # [C, H_audio, T/pooling]
        x = self.layer_norm(x.transpose(1, 2))
        return x if end is None else _zero_from(self.arch.num_features(end), x.transpose(1, 2)).transpose(1, 2)

    def _layers(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """Run the transformer's layers on x [T, C, H_audio], which is the same on all tensor-parallel ranks."""
        positions = x.shape[0]
        if self.config.sequence_parallel:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self._padding))
            x = scatter_to_sequence_parallel_region(x, group=self._tp_group)
        x = self.block(x.contiguous(), attention_mask=self._padding_mask(num_frames, positions))
        if self.config.sequence_parallel:
            # What follows is computed on every rank alike, so that each has the whole gradient already.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self._tp_group)
            x = x[:positions]
        return x

    def _padding_mask(self, num_frames: Tensor, positions: int) -> Tensor | None:
        """Return bool [C, 1, 1, T + padding], True where a position is masked; None if no position is."""
        if not self.arch.encodes_padding:
            valid = self.arch.frames_after_convolutions(num_frames)
        elif self._padding:
            valid = torch.full_like(num_frames, positions)
        else:
            return None
        numbers = torch.arange(positions + self._padding, device=num_frames.device)
        return (numbers[None] >= valid[:, None])[:, None, None, :]


def _zero_from(start: Tensor | None, x: Tensor) -> Tensor:
    """Return x [C, channels, T] with zeros from each clip's start [C] on: a clip does not depend on its padding."""
    if start is None:
        return x
    return x * (torch.arange(x.shape[-1], device=x.device)[None] < start[:, None])[:, None, :]


class WholeMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP, but it adds its last bias itself instead of returning the parameter beside its output.

    Autograd takes a parameter that leaves a recomputed part for a result of it, and the backward pass never ends.
    """

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, None]:
        """Run the MLP; there is no bias left to add."""
        output, bias = super().forward(*arguments, **named)
        return output + bias, None


def _keep_key_bias_zero(bias: torch.nn.Parameter, head_dim: int) -> None:
    """Drop the gradient of the keys' bias, which Whisper lacks and Megatron's fused projection has: it stays zero.

    A key bias does not change the attention, so its gradient is rounding noise, which Adam would scale to whole steps.

    Args:
        bias: [3 · D · heads / TP], for each head its query, key and value part.
        head_dim: D.
    """
    mask = torch.ones(3, head_dim, device=bias.device, dtype=bias.dtype)
    mask[1] = 0
    bias.register_hook(lambda grad: (grad.view(-1, 3, head_dim) * mask).view(-1))  # type: ignore[no-untyped-call]
