"""One rank's part of the vocabulary: its statistics, the collective that completes them, and its part of the gradient.

All public entries (logits in, hidden states in) go through here; none knows about blocks, padding or ranks. Where the logits come from, a
tensor or a product that is formed block by block, is the ``Logits``' business. N tokens, V vocabulary, TP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.backends import Backend, Weights
from megatron_cord.losses.kinds import Kind
from megatron_cord.losses.statistics import (
    Statistics,
    Totals,
    complete_totals,
    empty_statistics,
    merge_statistics,
    stack_statistics,
    totals_from_statistics,
)

#: Columns of a block. Where logits are a product, a block bounds what exists at a time (on a CPU it should stay in the cache, on CUDA fill the
#: device); where they exist already, few blocks mean few calls.
BLOCK_COLUMNS = {"cpu": 2**12, "cuda": 2**13}
STORED_BLOCK_COLUMNS = 2**15


class Logits(Protocol):
    """Logits of the same tokens, not divided by the temperature."""

    @property
    def block_columns(self) -> int:
        """Columns to ask for at a time."""
        ...

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        """Student's and teacher's columns of the span, [N, columns]; without a teacher the student's twice."""
        ...


class StoredLogits:
    """Logits that exist: student and teacher [N, V/TP] of any floating type."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher

    @property
    def block_columns(self) -> int:
        return STORED_BLOCK_COLUMNS

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        return self.student[:, span], self.teacher[:, span]


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns this rank holds, how the divergence is defined on them, and who computes."""

    kind: Kind
    temperature: float
    start: int  #: the first column's token id
    columns: int  #: columns that are tokens; the rest of the shard is padding. 0 on a rank that is all padding
    dtype: torch.dtype  #: of the statistics: float64 if an input is, else float32
    group: dist.ProcessGroup | None  #: the ranks that share the vocabulary; None means this one alone
    backend: Backend
    sequence_parallel: bool = (
        False  #: whether a rank needs the hidden states' gradient for its own part of the tokens only
    )

    def totals(self, logits: Logits, target_ids: Tensor) -> Totals:
        """``begin_totals``, waited for."""
        return self.begin_totals(logits, target_ids).wait()

    def begin_totals(self, logits: Logits, target_ids: Tensor) -> PendingTotals:
        """Divergence, entropy and log-probabilities over the whole vocabulary, with one all-gather; a two-pass kind needs a second one.

        Args:
            logits: of N tokens, padding included.
            target_ids: int64 [N], token ids of the whole vocabulary.

        Returns:
            fields [N], equal on all ranks of the group. Without tokens there is no collective, on any rank.
        """
        parts = [empty_statistics(target_ids.shape[0], dtype=self.dtype, device=target_ids.device)]
        top = parts[0].student_max.new_full((self.kind.top, target_ids.shape[0]), -torch.inf)
        for span in self.blocks(logits.block_columns):
            student, teacher = logits.block(span)
            target = target_ids - self.start - span.start
            parts.append(self.backend.statistics(student, teacher, target, self.kind, self.temperature, self.dtype))
            top = self._largest(torch.cat([top, teacher.T.to(self.dtype)])) if self.kind.top else top
        local = merge_statistics(stack_statistics(parts), self.kind, self.temperature)
        return PendingTotals(self, logits, self._gather(torch.cat([torch.stack(local), top])))  # [TP, 8 + k, N]

    def gradient(self, logits: Logits, target_ids: Tensor, totals: Totals, weights: Weights, out: Tensor) -> None:
        """Writes the gradient of this rank's student logits into ``out`` [N, V/TP], zero in the padding; no communication."""
        for span in self.blocks(logits.block_columns):
            self.block_gradient(span, *logits.block(span), target_ids, totals, weights, out[:, span])
        out[:, self.columns :] = 0.0

    def block_gradient(
        self,
        span: slice,
        student: Tensor,
        teacher: Tensor,
        target_ids: Tensor,
        totals: Totals,
        weights: Weights,
        out: Tensor,
    ) -> None:
        """The same for one block of columns, ``out`` [N, columns of the span]."""
        target = target_ids - self.start - span.start
        self.backend.gradient(student, teacher, target, totals, self.kind, self.temperature, weights, out)

    def blocks(self, size: int) -> list[slice]:
        """The columns that are tokens, ``size`` at a time."""
        return [slice(first, min(first + size, self.columns)) for first in range(0, self.columns, size)]

    @property
    def num_ranks(self) -> int:
        """TP."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def completed(self, gathered: Tensor, logits: Logits) -> Totals:
        """The totals from all ranks' statistics [TP, 8 + k, N]."""
        whole = merge_statistics(Statistics(*gathered[:, :8].unbind(1)), self.kind, self.temperature)
        threshold = self._largest(gathered[:, 8:].flatten(0, 1))[-1] if self.kind.top else None
        totals = totals_from_statistics(whole, self.kind, self.temperature, threshold)
        return self._second_pass(logits, totals) if self.kind.num_sums else totals

    def _second_pass(self, logits: Logits, totals: Totals) -> Totals:
        sums = totals.entropy.new_zeros(self.kind.num_sums, len(totals.entropy))
        for span in self.blocks(logits.block_columns):
            sums += self.backend.second_sums(*logits.block(span), totals, self.kind, self.temperature)
        return complete_totals(totals, self._gather(sums).wait().sum(0), self.kind)

    def _largest(self, values: Tensor) -> Tensor:
        """The k largest of [≥ k, N], in falling order, [k, N]."""
        return values.topk(self.kind.top, dim=0).values

    def _gather(self, mine: Tensor) -> Gathering:
        """Starts to collect every rank's part, [TP, scalars, N]."""
        if self.num_ranks == 1 or mine.numel() == 0:
            return Gathering(mine[None], None)
        gathered = mine.new_empty(self.num_ranks * mine.shape[0], mine.shape[1])
        work = dist.all_gather_into_tensor(gathered, mine.contiguous(), group=self.group, async_op=True)
        return Gathering(gathered.unflatten(0, (self.num_ranks, mine.shape[0])), work)


@dataclass(frozen=True)
class Gathering:
    """An all-gather under way."""

    result: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The result, complete."""
        if self.work is not None:
            self.work.wait()
        return self.result


@dataclass(frozen=True)
class PendingTotals:
    """Totals whose all-gather is under way."""

    shard: VocabularyShard
    logits: Logits  #: of these tokens; a two-pass kind looks at them again
    statistics: Gathering

    def wait(self) -> Totals:
        """Fields [N], equal on all ranks."""
        return self.shard.completed(self.statistics.wait(), self.logits)
