"""The interface of a backend (``choice`` picks one).

A backend turns one block of logits into its partial statistics, and the statistics of the whole vocabulary back into
the block's gradient. All backends compute the formulas of ``eager``.

Shapes: N tokens; a block is [N, columns] of any floating type, computed in the statistics' type.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_cord.losses.divergences import Divergence
from megatron_cord.losses.statistics import GlobalStats, PartialStats

#: Gradients of the loss with respect to divergence, entropy and log-probability, each [N]; None where the loss does not
#: use one.
UpstreamGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Backend(Protocol):
    """``student`` and ``teacher`` are a block of logits; ``target`` int64 [N] is the token's column within it."""

    def partial_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        divergence: Divergence,
        temperature: float,
        dtype: torch.dtype,
    ) -> PartialStats:
        """Return the block's eight scalars, each [N], in ``dtype``."""
        ...

    def second_sums(
        self, student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
    ) -> Tensor:
        """Return the second pass's sums of a two-pass divergence, [sums, N]."""
        ...

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        stats: GlobalStats,
        divergence: Divergence,
        temperature: float,
        upstream: UpstreamGrads,
        out: Tensor,
    ) -> None:
        """Write the gradient of the student's block to ``out`` [N, columns], which may be ``student``."""
        ...


def upstream_rows(upstream: UpstreamGrads, rows: slice) -> UpstreamGrads:
    """Return those of some tokens."""
    divergence, entropy, logprob = (None if grad is None else grad[rows] for grad in upstream)
    return divergence, entropy, logprob
