"""How one Megatron tensor is put together from Hugging Face tensors and split over tensor-parallel ranks, and back.

`join` makes, of the Hugging Face tensors, a full tensor whose equal slices along `shard_dim` are the ranks' shards;
`split` is its inverse. `pieces` and `ranges` describe the same in rows, so that a rank reads no more of a file than it
keeps.
Legend: TP ranks, H hidden, Q query heads, G key-value heads (groups), D head size, F ffn size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from megatron_cord.parallel.huge_pages import empty_in_huge_pages


class Piece(NamedTuple):
    """Rows start..stop of one Hugging Face tensor; part is its number in the rule, None for rows of zeros."""

    part: int | None
    start: int
    stop: int


class TensorLayout(ABC):
    """One way to lay a tensor out."""

    shard_dim: ClassVar[int | None] = 0  #: the dimension split over TP ranks; None if every rank holds all of it

    @abstractmethod
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        """Make the full Megatron tensor of Hugging Face tensors.

        Args:
            tensors: in the rule's order; None where the family has no such tensor.
            tp: tensor-parallel ranks.
            rows: the first dimension's size in the model, padding included.
        """

    @abstractmethod
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        """Return what `split` does without copying.

        A tensor that does not lie in one piece has a dimension more, [pieces, rows of a piece, ...].
        """

    def split(self, full: Tensor, tp: int) -> list[Tensor]:
        """Return the Hugging Face tensors, in the rule's order, of the full Megatron tensor."""
        return [view if view.dim() == full.dim() else _joined(view) for view in self.views(full, tp)]

    @abstractmethod
    def pieces(self, rows: int) -> list[Piece]:
        """Return, in order, what the rows of a single rank's tensor consist of; rows counts them, padding included."""

    def runs(self, tp: int) -> int:
        """Return into how many runs a shard's rows of each part are cut, which alternate with those of other parts."""
        return 1

    def ranges(self, rows: int, tp: int, rank: int) -> list[tuple[int, int]]:
        """Return which of those rows are this rank's, in its shard's order."""
        if self.shard_dim != 0:
            return [(0, rows)]
        return [(rank * rows // tp, (rank + 1) * rows // tp)]


def _joined(pieces: Tensor) -> Tensor:
    """[pieces, rows of a piece, ...] → [rows, ...]."""
    if not pieces.is_contiguous():
        pieces = empty_in_huge_pages(*pieces.shape, dtype=pieces.dtype, device=pieces.device).copy_(pieces)
    return pieces.flatten(0, 1)


def _only(tensors: Sequence[Tensor | None]) -> Tensor:
    (tensor,) = tensors
    assert tensor is not None
    return tensor


class _Single(TensorLayout):
    """One Hugging Face tensor, unchanged."""

    @override
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        return _only(tensors)

    @override
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        return [full]

    @override
    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, rows)]


class Replicated(_Single):
    """Every rank holds the whole tensor."""

    shard_dim = None


class Column(_Single):
    """Column-parallel: rows of the weight [out / TP, in]."""


class Row(_Single):
    """Row-parallel: columns of the weight [out, in / TP]."""

    shard_dim = 1


@dataclass(frozen=True)
class Vocabulary(TensorLayout):
    """Embedding or output layer [V_padded / TP, H]; the padding rows are zero and are dropped on the way back."""

    vocab_size: int

    @override
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        tensor = _only(tensors)
        return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))

    @override
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        return [full[: self.vocab_size]]

    @override
    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, self.vocab_size), Piece(None, 0, rows - self.vocab_size)]


@dataclass(frozen=True)
class Qkv(TensorLayout):
    """Fused projection [(Q + 2G) D, H] or bias [(Q + 2G) D]: for each group its Q/G query heads, its key, its value.

    A None among the tensors stands for zeros (Whisper's keys have no bias) and is dropped on the way back.
    """

    num_heads: int
    num_groups: int
    head_dim: int

    @property
    def _heads(self) -> list[int]:
        """Query, key and value heads of one group."""
        return [self.num_heads // self.num_groups, 1, 1]

    @override
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        present = next(t for t in tensors if t is not None)
        rest = present.shape[1:]
        grouped = []
        for tensor, heads in zip(tensors, self._heads, strict=True):
            shape = (self.num_groups, heads, self.head_dim, *rest)
            grouped.append(present.new_zeros(shape) if tensor is None else tensor.reshape(shape))
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    @override
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        rest = full.shape[1:]
        grouped = full.reshape(self.num_groups, sum(self._heads), self.head_dim, *rest)
        return [piece.flatten(1, 2) for piece in torch.split(grouped, self._heads, dim=1)]

    @override
    def runs(self, tp: int) -> int:
        return self.num_groups // tp

    @override
    def pieces(self, rows: int) -> list[Piece]:
        sizes = [heads * self.head_dim for heads in self._heads]
        return [
            Piece(i, group * size, (group + 1) * size)
            for group in range(self.num_groups)
            for i, size in enumerate(sizes)
        ]


class Stacked(TensorLayout):
    """Parts of equal size one below the other, whole on every rank that has the tensor: an expert's first layer."""

    shard_dim = None

    @override
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        return torch.cat([tensor for tensor in tensors if tensor is not None])

    @override
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        return list(full.chunk(2))

    @override
    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, rows // 2), Piece(1, 0, rows // 2)]


class GateUp(TensorLayout):
    """SwiGLU's fused first layer [2F, H]: each rank holds its rows of the gate, then its rows of the up projection."""

    @override
    def join(self, tensors: Sequence[Tensor | None], tp: int, rows: int) -> Tensor:
        pieces = [t.reshape(tp, -1, *t.shape[1:]) for t in tensors if t is not None]
        joined = torch.cat(pieces, dim=1)
        return joined.reshape(-1, *joined.shape[2:])

    @override
    def views(self, full: Tensor, tp: int) -> list[Tensor]:
        by_rank = full.reshape(tp, 2, -1, *full.shape[1:])
        return [by_rank[:, i] for i in range(2)]

    @override
    def pieces(self, rows: int) -> list[Piece]:
        return [Piece(0, 0, rows // 2), Piece(1, 0, rows // 2)]

    @override
    def ranges(self, rows: int, tp: int, rank: int) -> list[tuple[int, int]]:
        half = rows // 2
        first, last = rank * half // tp, (rank + 1) * half // tp
        return [(first, last), (half + first, half + last)]
