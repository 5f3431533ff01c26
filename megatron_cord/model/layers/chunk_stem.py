"""The convolutions of an encoder without a window, a chunk of frames at a time, and the sinusoids of its positions.

A clip gives the same positions in every batch: its last chunk is padded with silence to a whole one if it has others
before it, and a clip within one chunk is computed as it is. transformers' Qwen3-Omni does so with a clip alone; with
several it pads all chunks to the longest, which the last positions of a clip shorter than one chunk depend on.
Legend: C clips, n chunks of a portion, T positions of all clips, H_audio the encoder's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from megatron_cord.model.architecture import ChunkArchitecture

_PORTION = 64  # chunks that are convolved at a time, which bounds the memory of a long recording without gradients


class ChunkStem(torch.nn.Module):
    """Three convolutions over mel bands and frames, and a projection of what they leave of a column of bands.

    Args:
        arch: of the chunks.
        num_mels: bands of the log-mel spectrum.
        hidden: H_audio.
        dtype: of parameters and activations.
        device: where they are.
    """

    def __init__(
        self, arch: ChunkArchitecture, num_mels: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.arch = arch
        self.conv1, self.conv2, self.conv3 = (
            torch.nn.Conv2d(entering, arch.channels, kernel_size=3, stride=2, padding=1, dtype=dtype, device=device)
            for entering in (1, arch.channels, arch.channels)
        )
        columns = arch.channels * arch.bands(num_mels)
        self.projection = torch.nn.Linear(columns, hidden, bias=False, dtype=dtype, device=device)
        table = sinusoids(arch.positions(arch.frames), hidden)
        self.register_buffer("positions", table.to(device), persistent=False)

    def forward(self, features: Tensor | Sequence[Tensor], num_frames: Sequence[int]) -> Tensor:
        """Return [T, H_audio], one clip after the other, with the embedding of the positions.

        Args:
            features: C times [mels, frames], with as many frames as the clip has, or more.
            num_frames: C numbers, the frames of each clip.
        """
        chunks: list[Tensor] = []
        counts: list[int] = []
        for clip, frames in zip(features, num_frames, strict=True):
            pieces = list(clip[:, :frames].split(self.arch.frames, dim=1))
            counts += [self.arch.positions(piece.shape[1]) for piece in pieces]
            if len(pieces) > 1:
                pieces[-1] = pad(pieces[-1], (0, self.arch.frames - pieces[-1].shape[1]))
            chunks += pieces
        made = _in_portions(chunks, self._convolve)
        return torch.cat([made[number][:count] for number, count in enumerate(counts)])

    def _convolve(self, chunks: Tensor) -> Tensor:
        """Map [n, mels, frames] to [n, positions, H_audio]."""
        x = chunks[:, None].to(self.conv1.weight.dtype)
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = gelu(convolution(x))
        columns = x.permute(0, 3, 1, 2).flatten(2)  # [n, positions, channels · bands]
        positions: Tensor = self.positions[: columns.shape[1]].to(x.dtype)  # type: ignore[index]
        projected: Tensor = self.projection(columns) + positions
        return projected


class WhisperChunkStem(torch.nn.Module):
    """Whisper's two convolutions, the second with stride 2, of each chunk alone: around it there are zeros.

    Args:
        arch: of the chunks.
        num_mels: bands of the log-mel spectrum.
        hidden: H_audio.
        dtype: of parameters and activations.
        device: where they are.
    """

    def __init__(
        self, arch: ChunkArchitecture, num_mels: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.arch = arch
        self.conv1, self.conv2 = (
            torch.nn.Conv1d(entering, hidden, kernel_size=3, stride=stride, padding=1, dtype=dtype, device=device)
            for entering, stride in ((num_mels, 1), (hidden, 2))
        )
        self.register_buffer("positions", sinusoids(arch.positions(arch.frames), hidden).to(device), persistent=False)

    def forward(self, features: Tensor | Sequence[Tensor], num_frames: Sequence[int]) -> Tensor:
        """Return [T, H_audio], one clip after the other, with the embedding of the positions.

        Args:
            features: C times [mels, frames], with as many frames as the clip has, or more.
            num_frames: C numbers, the frames of each clip.
        """
        clips = zip(features, num_frames, strict=True)
        chunks = [chunk for clip, frames in clips for chunk in clip[:, :frames].split(self.arch.frames, dim=1)]
        made = _in_portions(chunks, self._convolve)
        return torch.cat([made[number] for number in range(len(chunks))])

    def _convolve(self, chunks: Tensor) -> Tensor:
        """Map [n, mels, frames] to [n, positions, H_audio]."""
        x = gelu(self.conv2(gelu(self.conv1(chunks.to(self.conv1.weight.dtype))))).transpose(1, 2)
        positions: Tensor = self.positions[: x.shape[1]].to(x.dtype)  # type: ignore[index]
        return x + positions


def _in_portions(chunks: Sequence[Tensor], convolve: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Return what becomes of each chunk [mels, frames], by its number; those of one length are convolved together."""
    made: dict[int, Tensor] = {}
    by_width: dict[int, list[int]] = {}
    for number, chunk in enumerate(chunks):
        by_width.setdefault(chunk.shape[1], []).append(number)
    for numbers in by_width.values():
        for start in range(0, len(numbers), _PORTION):
            portion = numbers[start : start + _PORTION]
            made |= zip(portion, convolve(torch.stack([chunks[i] for i in portion])), strict=True)
    return made


def sinusoids(positions: int, channels: int) -> Tensor:
    """Return Whisper's position embeddings, float32 [positions, channels]: sines, then cosines along the channels."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half).float())
    angles = torch.arange(positions)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
