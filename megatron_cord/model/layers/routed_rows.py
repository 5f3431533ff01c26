"""Which rows of a microbatch the routers of a rank see, whose they are, and which experts are given for them.

Legend: B sequences, S padded length, T rows of this rank, L layers, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.transfers import to_device


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """The rows of a microbatch that this rank routes.

    Attributes:
        sequence: int64 [T], the sequence of each row; B for padding.
        lengths: float32 [B], the tokens of each sequence on all ranks.
        given: int16 [T, L, k], experts that each layer shall choose, -1 where it chooses by itself; None: everywhere.
    """

    sequence: Tensor
    lengths: Tensor
    given: Tensor | None = None


def find_rows(
    size: int,
    length: int,
    lengths: Sequence[int],
    cu_seqlens: Sequence[int] | None,
    given: Tensor | None,
    layout: Layout,
) -> RoutedRows:
    """Return the rows of a microbatch that this rank's layers have.

    Args:
        size: B, or 1 for a packed microbatch.
        length: S, or the packed length.
        lengths: B numbers, tokens of each sequence.
        cu_seqlens: where packed sequences begin, B + 1 numbers; None for padded ones.
        given: int16 [S, B, L, k] in host memory; None where routers choose by themselves.
        layout: how rows are split over ranks.
    """

    def own(rows: Tensor) -> Tensor:
        if layout.config.cp > 1:
            rows = rows.index_select(0, layout.sequence_sharding.rows(cu_seqlens or (0, length)))
        if layout.config.sequence_parallel:
            rows = rows.chunk(layout.config.tp)[layout.tp_group.rank()]
        return rows.flatten(0, 1)

    sequence = torch.full((length, size), len(lengths))
    for i, tokens in enumerate(lengths):
        column, start = (i, 0) if cu_seqlens is None else (0, cu_seqlens[i])
        sequence[start : start + tokens, column] = i
    tokens_of = torch.tensor(lengths, dtype=torch.float32)
    followed = None if given is None else to_device(own(given), layout.device)
    return RoutedRows(to_device(own(sequence), layout.device), to_device(tokens_of, layout.device), followed)
