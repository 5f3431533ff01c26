"""Which tokens of a sequence each rank holds under context and sequence parallelism.

Context parallelism cuts every sequence into 2 · CP chunks and gives rank r the chunks r and 2 · CP − 1 − r: transformer-engine's zig-zag
order, in which causal attention costs every rank the same. Legend: T tokens of all sequences of a microbatch, CP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceCut:
    """How this rank's layout cuts the sequence dimension."""

    cp: int = 1  #: context-parallel ranks
    cp_rank: int = 0  #: this one's place among them
    sequence_parallel: int = 1  #: ranks that share the activations between tensor-parallel regions

    @property
    def chunks(self) -> int:
        """Every sequence's length must be a multiple of it."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def multiple_of(self) -> int:
        """T must be a multiple of it."""
        return self.chunks * self.sequence_parallel

    def rows(self, borders: Sequence[int]) -> Tensor:
        """int64 [T / CP], the rows of this rank; sequence i is the rows [borders[i], borders[i+1])."""
        return zigzag_rows(borders, self.cp, self.cp_rank)


def zigzag_rows(borders: Sequence[int], ranks: int, rank: int) -> Tensor:
    """int64 [T / CP], the rows that a rank holds, in the order in which it holds them."""
    if ranks == 1:
        return torch.arange(borders[0], borders[-1])
    rows = []
    for start, end in pairwise(borders):
        size = (end - start) // (2 * ranks)
        for chunk in (rank, 2 * ranks - 1 - rank):
            rows.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.cat(rows)


def natural_order(borders: Sequence[int], ranks: int) -> Tensor:
    """int64 [T], where each row is found when the ranks' rows stand one rank after the other."""
    return torch.argsort(torch.cat([zigzag_rows(borders, ranks, rank) for rank in range(ranks)]))
