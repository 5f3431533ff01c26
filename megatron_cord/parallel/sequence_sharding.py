"""Which tokens of a sequence each rank holds under context and sequence parallelism.

Context parallelism splits every sequence into 2 · CP chunks and gives rank r the chunks r and 2 · CP − 1 − r:
transformer-engine's zig-zag order, in which causal attention costs every rank the same.
Legend: T tokens of all sequences of a microbatch, CP ranks; sequence i is the rows [cu_seqlens[i], cu_seqlens[i + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSharding:
    """How this rank's layout splits the sequence dimension."""

    cp: int = 1  #: context-parallel ranks
    cp_rank: int = 0  #: this one's number among them
    sequence_parallel: int = 1  #: ranks that share the activations between tensor-parallel regions

    @property
    def chunks(self) -> int:
        """Every sequence's length must be a multiple of it."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def multiple_of(self) -> int:
        """T must be a multiple of it."""
        return self.chunks * self.sequence_parallel

    def rows(self, cu_seqlens: Sequence[int]) -> Tensor:
        """Return int64 [T / CP], the rows of this rank."""
        return zigzag_rows(cu_seqlens, self.cp, self.cp_rank)


def zigzag_rows(cu_seqlens: Sequence[int], ranks: int, rank: int) -> Tensor:
    """Return int64 [T / CP], the rows that a rank holds, in its order."""
    if ranks == 1:
        return torch.arange(cu_seqlens[0], cu_seqlens[-1])
    rows = []
    for start, end in pairwise(cu_seqlens):
        size = (end - start) // (2 * ranks)
        for chunk in (rank, 2 * ranks - 1 - rank):
            rows.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.cat(rows)


def natural_order(cu_seqlens: Sequence[int], ranks: int) -> Tensor:
    """Return int64 [T], where each row is found when the ranks' rows stand one rank after the other."""
    return torch.argsort(torch.cat([zigzag_rows(cu_seqlens, ranks, rank) for rank in range(ranks)]))
