"""The last stage's output weight in parts over all stages, for one update, and their gradients back to it.

Weight, optimizer state, checkpoints and weight sync stay where they are: a part is a copy. The ranks of a pipeline and
of its tensor-parallel groups hold equal parts, in the order of their group; what is left over is padding.
Legend: V padded vocabulary, H hidden, TP tensor-parallel ranks, P stages, R = ⌈V / (TP · P)⌉ rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.layout import Layout

_BLOCK = 2**24  #: elements of each part that travel at a time, so that little memory is taken


def spread_rows(weight: Tensor | None, vocabulary: int, width: int, dtype: torch.dtype, layout: Layout) -> Tensor:
    """Return this rank's part of the weight, [R, H]; rows of padding are 0. Collective over `vocabulary_group`.

    Args:
        weight: [V/TP, H] on the last stage, None elsewhere.
        vocabulary: V.
        width: H.
        dtype: of the weight.
        layout: this rank's place.
    """
    rows = part_rows(vocabulary, layout)
    part = torch.zeros(rows, width, dtype=dtype, device=layout.device)
    for first, last in _blocks(rows, width):
        operations = []
        for piece in _pieces(vocabulary, first, last, layout):
            if piece.is_owner and piece.is_holder:
                part[piece.inside] = _given(weight)[piece.outside]
            elif piece.is_owner:
                operations.append(piece.message(dist.isend, _given(weight)[piece.outside], piece.holder))
            elif piece.is_holder:
                operations.append(piece.message(dist.irecv, part[piece.inside], piece.owner))
        _exchange(operations)
    return part


def collect_rows(part: Tensor, into: Tensor | None, vocabulary: int, layout: Layout) -> None:
    """Add the parts [R, H] of all ranks to the rows of the last stage's [V/TP, H]. Collective over `vocabulary_group`.

    Args:
        part: this rank's.
        into: on the last stage, of the same type; None elsewhere.
        vocabulary: V.
        layout: this rank's place.
    """
    for first, last in _blocks(*part.shape):
        operations, received = [], []
        for piece in _pieces(vocabulary, first, last, layout):
            if piece.is_owner and piece.is_holder:
                _given(into)[piece.outside] += part[piece.inside]
            elif piece.is_owner:
                target = _given(into)[piece.outside]
                received.append((target, torch.empty_like(target)))
                operations.append(piece.message(dist.irecv, received[-1][1], piece.holder))
            elif piece.is_holder:
                operations.append(piece.message(dist.isend, part[piece.inside], piece.owner))
        _exchange(operations)
        for target, values in received:
            target += values


def part_rows(vocabulary: int, layout: Layout) -> int:
    """Return R."""
    return -(-vocabulary // layout.vocabulary_group.size())


class _Piece:
    """Rows of the vocabulary that one rank of the last stage owns and one rank's part holds.

    Args:
        owner: in `vocabulary_group`.
        holder: likewise.
        start: the first row, of V.
        stop: behind the last row.
        layout: this rank's place.
        vocabulary: V.
    """

    def __init__(self, owner: int, holder: int, start: int, stop: int, layout: Layout, vocabulary: int) -> None:
        self.owner, self.holder, self._group = owner, holder, layout.vocabulary_group
        rank, tp = self._group.rank(), layout.config.tp
        self.is_owner, self.is_holder = rank == owner, rank == holder
        in_weight, in_part = owner % tp * (vocabulary // tp), holder * part_rows(vocabulary, layout)
        self.outside, self.inside = slice(start - in_weight, stop - in_weight), slice(start - in_part, stop - in_part)

    def message(self, operation: object, tensor: Tensor, peer: int) -> dist.P2POp:
        """Return a message to or from another rank of the group."""
        return dist.P2POp(operation, tensor, dist.get_global_rank(self._group, peer), self._group)  # type: ignore[arg-type]


def _pieces(vocabulary: int, first: int, last: int, layout: Layout) -> Iterator[_Piece]:
    """Yield the pieces that rows [first, last) of all parts consist of, in an order that all ranks have."""
    tp, rows, each = layout.config.tp, part_rows(vocabulary, layout), vocabulary // layout.config.tp
    for holder in range(layout.vocabulary_group.size()):
        for place in range(tp):
            start = max(holder * rows + first, place * each)
            stop = min(holder * rows + last, (place + 1) * each)
            if start < stop:
                yield _Piece((layout.config.pp - 1) * tp + place, holder, start, stop, layout, vocabulary)


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK // width)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


def _exchange(operations: list[dist.P2POp]) -> None:
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
