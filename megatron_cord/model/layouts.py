"""How one Megatron tensor is put together from Hugging Face tensors and cut over tensor-parallel ranks, and back.

`join` makes, of the Hugging Face tensors, a full tensor whose equal slices along `shard_dim` are the ranks' shards; `part` is its inverse.
`pieces` and `ranges` say the same in rows, so that a rank reads no more of a file than it keeps.
Legend: TP ranks, H hidden, Q query heads, G key-value heads (groups), D head size, F ffn size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_cord.parallel.memory import fresh


class Piece(NamedTuple):
    """Rows start..stop of one Hugging Face tensor; part is its place in the rule, None for rows of zeros."""

    part: int | None
    start: int
    stop: int


class Layout(Protocol):
    """One way to lay a tensor out."""

    @property
    def shard_dim(self) -> int | None:
        """The dimension cut over TP ranks; None if every rank holds all of it."""
        ...

    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        """Hugging Face tensors to the full Megatron tensor; rows is its first dimension's size in the model (after padding)."""
        ...

    def part(self, full: Tensor, tp: int) -> list[Tensor]:
        """The full Megatron tensor to Hugging Face tensors, in the rule's order."""
        ...

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        """As `part`, without copying: a tensor that does not lie in one piece has a dimension more, [pieces, rows of a piece, ...]."""
        ...

    def pieces(self, rows: int) -> list[Piece]:
        """What the rows of the tensor that a single rank would hold consist of, in their order; rows counts them, padding included."""
        ...

    def ranges(self, rows: int, tp: int, rank: int) -> list[tuple[int, int]]:
        """Which of those rows are this rank's, in its shard's order."""
        ...


def _only(tensors: Sequence[Tensor | None]) -> Tensor:
    (tensor,) = tensors
    assert tensor is not None
    return tensor


class _Parted:
    """What `part` is for all."""

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        raise NotImplementedError

    def part(self, full: Tensor, tp: int) -> list[Tensor]:
        return [view if view.dim() == full.dim() else _joined(view) for view in self.views(full, tp)]


def _joined(pieces: Tensor) -> Tensor:
    """[pieces, rows of a piece, ...] → [rows, ...]."""
    if not pieces.is_contiguous():
        pieces = fresh(*pieces.shape, dtype=pieces.dtype, device=pieces.device).copy_(pieces)
    return pieces.flatten(0, 1)


class _Cut(_Parted):
    """Shards are neighbouring rows, or all of them."""

    shard_dim: int | None

    def ranges(self, rows: int, tp: int, rank: int) -> list[tuple[int, int]]:
        if self.shard_dim != 0:
            return [(0, rows)]
        return [(rank * rows // tp, (rank + 1) * rows // tp)]


class _Single(_Cut):
    """One Hugging Face tensor, unchanged."""

    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, rows)]

    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        return _only(tensors)

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class Replicated(_Single):
    """Every rank holds the whole tensor."""

    shard_dim: int | None = None


@dataclass(frozen=True)
class Column(_Single):
    """Column-parallel: rows of the weight [out / TP, in]."""

    shard_dim: int | None = 0


@dataclass(frozen=True)
class Row(_Single):
    """Row-parallel: columns of the weight [out, in / TP]."""

    shard_dim: int | None = 1


@dataclass(frozen=True)
class Vocabulary(_Cut):
    """Embedding or output layer [V_padded / TP, H]; the padding rows are zero and are dropped on the way back."""

    vocab_size: int
    shard_dim: int | None = 0

    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        tensor = _only(tensors)
        return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        return [full[: self.vocab_size]]

    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, self.vocab_size), Piece(None, 0, rows - self.vocab_size)]


@dataclass(frozen=True)
class Qkv(_Cut):
    """Fused projection [(Q + 2G) D, H] or bias [(Q + 2G) D]: for each group its Q/G query heads, its key, its value.

    A None among the tensors stands for zeros (Whisper's keys have no bias) and is dropped on the way back.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    shard_dim: int | None = 0

    @property
    def _split(self) -> list[int]:
        return [self.num_heads // self.num_groups, 1, 1]

    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        present = next(t for t in tensors if t is not None)
        rest = present.shape[1:]
        grouped = []
        for tensor, heads in zip(tensors, self._split, strict=True):
            shape = (self.num_groups, heads, self.head_dim, *rest)
            grouped.append(present.new_zeros(shape) if tensor is None else tensor.reshape(shape))
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        rest = full.shape[1:]
        grouped = full.reshape(self.num_groups, sum(self._split), self.head_dim, *rest)
        return [piece.flatten(1, 2) for piece in grouped.split(self._split, dim=1)]

    def pieces(self, rows: int) -> list[Piece]:
        sizes = [heads * self.head_dim for heads in self._split]
        return [
            Piece(i, group * size, (group + 1) * size)
            for group in range(self.num_groups)
            for i, size in enumerate(sizes)
        ]


@dataclass(frozen=True)
class GateUp(_Parted):
    """SwiGLU's fused first layer [2F, H]: each rank holds its rows of the gate, then its rows of the up projection."""

    shard_dim: int | None = 0

    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        pieces = [t.reshape(tp, -1, *t.shape[1:]) for t in tensors if t is not None]
        joined = torch.cat(pieces, dim=1)
        return joined.reshape(-1, *joined.shape[2:])

    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        by_rank = full.reshape(tp, 2, -1, *full.shape[1:])
        return [by_rank[:, i] for i in range(2)]

    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, rows // 2), Piece(1, 0, rows // 2)]

    def ranges(self, rows: int, tp: int, rank: int) -> list[tuple[int, int]]:
        half = rows // 2
        first, last = rank * half // tp, (rank + 1) * half // tp
        return [(first, last), (half + first, half + last)]
