"""The audio tower: a Whisper-style encoder on Megatron's tensor-parallel layers.

Only what a clip needs is computed: its own positions, packed one clip after the other, without the rest of the
encoder's window. Families whose encoder takes the silence in (`EncoderArchitecture.encodes_padding`) need all of it.
Those without a window have other convolutions (`layers/chunk_stem.py`), and their clips attend in parts.
Under sequence parallelism the positions of all clips are split over the tensor-parallel ranks between the layers'
matrices; what a number that they do not divide lacks is a sequence of zeros of its own, so that no row is undefined.
Simplification: the convolutions take one clip at a time.
Legend: C clips, T positions of all clips after the convolutions, F their features, H_audio the encoder's width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
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
from megatron_cord.model.layers.attention import packed_sequences, select_key_rows
from megatron_cord.model.layers.chunk_stem import ChunkStem, WhisperChunkStem
from megatron_cord.model.layers.packed_rows import first_rows
from megatron_cord.model.layers.transformer import block_spec, encoder_config
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
        if arch.chunks is not None:
            kind = ChunkStem if arch.chunks.channels else WhisperChunkStem
            self.stem = kind(arch.chunks, arch.num_mels, hidden, dtype, layout.device)
        else:
            self._add_convolutions(dtype, layout.device)
        groups = copy.copy(layout.groups)
        groups.pp = groups.cp = layout.solo  # this block is whole here, however the language model is split
        self._tp_group = layout.tp_group
        # transformer-engine takes packed sequences under this type; there is no mask.
        spec = block_spec(config, AttnMaskType.padding, layers, arch.num_layers)
        self.block = TransformerBlock(config, spec, post_layer_norm=False, pg_collection=groups)
        self.layer_norm = torch.nn.LayerNorm(hidden, eps=config.layernorm_epsilon, dtype=dtype, device=layout.device)
        for layer in self.block.layers:
            keep_key_bias(layer.self_attention.linear_qkv.bias, hidden // arch.num_heads)
            if arch.tail_frames:
                select_key_rows(layer.self_attention.core_attention)
            layer.mlp.__class__ = WholeMLP

    def _add_convolutions(self, dtype: torch.dtype, device: torch.device) -> None:
        """Add Whisper's two convolutions, and its sinusoids, which are stored in the checkpoint."""
        mels, hidden = self.arch.num_mels, self.arch.hidden_size
        self.conv1 = torch.nn.Conv1d(mels, hidden, kernel_size=3, padding=1, dtype=dtype, device=device)
        self.conv2 = torch.nn.Conv1d(hidden, hidden, kernel_size=3, stride=2, padding=1, dtype=dtype, device=device)
        positions = torch.empty(self.arch.max_positions, hidden, dtype=dtype, device=device)
        self.embed_positions = torch.nn.Parameter(positions, requires_grad=False)

    def forward(self, features: Tensor | Sequence[Tensor], num_frames: Sequence[int]) -> Tensor:
        """Encode clips.

        Args:
            features: C times [mels, frames], clips padded to the window, or to any length where there is none.
            num_frames: C numbers, the valid frames of each clip.

        Returns:
            [F, H_audio], clip i with `num_outputs(num_frames[i])` of them.
        """
        lengths = [self.arch.computed_positions(frames) for frames in num_frames]
        if self.arch.chunks is not None:
            convolved: Tensor = self.stem(features, num_frames)
        else:
            convolved = torch.cat([self._convolve(*clip) for clip in zip(features, num_frames, lengths, strict=True)])
        spans = [span for frames in num_frames for span in self.arch.attention_spans(frames)]
        x = self._layers(convolved, [length for length, _ in spans], [attended for _, attended in spans])
        pooled = [length // self.arch.pooling for length in lengths]
        x = first_rows(x, lengths, [count * self.arch.pooling for count in pooled])
        encoded: Tensor = self.layer_norm(x.reshape(-1, self.arch.pooling, x.shape[-1]).mean(1))
        return encoded

    def num_outputs(self, num_frames: int) -> int:
        """Return how many features `forward` gives of a clip, those of the frames that end it included."""
        return self.arch.computed_positions(num_frames) // self.arch.pooling

    def _convolve(self, clip: Tensor, num_frames: int, positions: int) -> Tensor:
        """Map a clip [mels, frames] to [positions, H_audio], with the embedding of the positions."""
        seen = clip[None, :, : self.arch.seen_frames(num_frames)].to(self.conv1.weight.dtype)
        x = torch.nn.functional.gelu(self.conv1(seen))
        x = torch.nn.functional.gelu(self.conv2(x))[0, :, :positions]
        return x.T + self.embed_positions[:positions]

    def _layers(self, x: Tensor, lengths: list[int], attended: list[int]) -> Tensor:
        """Run the transformer's layers on x [T, H_audio], which is the same on all tensor-parallel ranks.

        Args:
            x: positions of all clips.
            lengths: of the parts that attend to themselves alone.
            attended: positions of each, from its first on, that are attended to.
        """
        total = x.shape[0]
        x = x.unsqueeze(1)  # Megatron's batch dimension
        if self.config.sequence_parallel:
            if padding := -total % self.config.tensor_model_parallel_size:
                x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
                lengths, attended = [*lengths, padding], [*attended, padding]
            x = scatter_to_sequence_parallel_region(x, group=self._tp_group)
        packed = packed_sequences(tuple(accumulate(lengths, initial=0)), x.device, attended)
        x = self.block(x.contiguous(), attention_mask=None, packed_seq_params=packed)
        if self.config.sequence_parallel:
            # What follows is computed on every rank alike, so that each has the whole gradient already.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self._tp_group)
        return x[:total, 0]


class WholeMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP, but it adds its last bias itself instead of returning the parameter beside its output.

    Autograd takes a parameter that leaves a recomputed part for a result of it, and the backward pass never ends.
    """

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, None]:
        """Run the MLP; there is no bias left to add."""
        output, bias = super().forward(*arguments, **named)
        return output + bias, None


def keep_key_bias(bias: torch.nn.Parameter, head_dim: int) -> None:
    """Drop the gradient of the keys' bias: it stays as it is, which is zero where a family has none, as Whisper.

    A key bias does not change the attention, so its gradient is rounding noise, which Adam would scale to whole steps.

    Args:
        bias: [3 · D · heads / TP], for each head its query, key and value part.
        head_dim: D.
    """
    mask = torch.ones(3, head_dim, device=bias.device, dtype=bias.dtype)
    mask[1] = 0
    bias.register_hook(lambda grad: (grad.view(-1, 3, head_dim) * mask).view(-1))  # type: ignore[no-untyped-call]
