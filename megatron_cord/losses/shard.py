"""One rank's part of the vocabulary: its statistics, the one all-gather that completes them, and its part of the gradient.

Both public entries (logits in, hidden states in) go through here; neither knows about blocks, padding or ranks.
Simplification: eager torch, columns a block at a time. N tokens, V vocabulary, TP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.kinds import Kind
from megatron_cord.losses.statistics import (
    Statistics,
    Totals,
    block_statistics,
    empty_statistics,
    gradient_block,
    merge_statistics,
    stack_statistics,
    totals_from_statistics,
)

#: Columns that are upcast and summed at a time.
BLOCK_COLUMNS = 8192


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns this rank holds, and how the divergence is defined on them."""

    kind: Kind
    temperature: float
    start: int  #: the first column's token id
    columns: int  #: columns that are tokens; the rest of the shard is padding. 0 on a rank that is all padding
    dtype: torch.dtype  #: of the statistics: float64 if an input is, else float32
    group: dist.ProcessGroup | None  #: the ranks that share the vocabulary; None means this one alone

    def totals(self, student_logits: Tensor, teacher_logits: Tensor, target_ids: Tensor) -> Totals:
        """Divergence, entropy and log-probabilities over the whole vocabulary, with one all-gather.

        Args:
            student_logits, teacher_logits: [N, V/TP] of any floating type, not divided by the temperature, padding included.
            target_ids: int64 [N], token ids of the whole vocabulary.

        Returns:
            fields [N], equal on all ranks of the group. Without tokens there is no collective, on any rank.
        """
        parts = [
            block_statistics(
                student_logits[:, span].to(self.dtype),
                teacher_logits[:, span].to(self.dtype),
                target_ids - self.start - span.start,
                self.kind,
                self.temperature,
            )
            for span in self._blocks()
        ]
        parts.append(empty_statistics(target_ids.shape[0], dtype=self.dtype, device=target_ids.device))
        local = merge_statistics(stack_statistics(parts), self.kind, self.temperature)
        return totals_from_statistics(self._merge_ranks(local), self.kind, self.temperature)

    def gradient(
        self, student_logits: Tensor, teacher_logits: Tensor, target_ids: Tensor, totals: Totals, weights: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Gradient of this rank's student logits; arguments as in ``totals``, no communication.

        Args:
            weights: each [N]: the gradients that arrived at divergence, entropy and the student's log-probability.

        Returns:
            [N, V/TP] in ``dtype``; zero in the padding.
        """
        gradient = torch.zeros(student_logits.shape, dtype=self.dtype, device=student_logits.device)
        for span in self._blocks():
            gradient[:, span] = gradient_block(
                student_logits[:, span].to(self.dtype),
                teacher_logits[:, span].to(self.dtype),
                target_ids - self.start - span.start,
                totals,
                self.kind,
                self.temperature,
                *weights,
            )
        return gradient

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over the group, in place: the hidden states' gradient, to which every rank's columns contribute."""
        if self._num_ranks() > 1 and tensor.numel() > 0:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _blocks(self) -> list[slice]:
        return [slice(first, min(first + BLOCK_COLUMNS, self.columns)) for first in range(0, self.columns, BLOCK_COLUMNS)]

    def _num_ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def _merge_ranks(self, local: Statistics) -> Statistics:
        if self._num_ranks() == 1 or local.student_max.numel() == 0:
            return local
        mine = torch.stack(local)  # [8, N]
        gathered = [torch.empty_like(mine) for _ in range(self._num_ranks())]
        dist.all_gather(gathered, mine, group=self.group)
        return merge_statistics(Statistics(*torch.stack(gathered, dim=1).unbind(0)), self.kind, self.temperature)
