"""One rank's part of the vocabulary: its statistics, the collective that completes them, and its part of the gradient.

All public functions (logits in, hidden states in) go through here; none handles blocks, padding or ranks itself. Where
logits come from, a tensor or a product that is formed block by block, is hidden behind ``Logits``.

Shapes: N tokens, V vocabulary, TP ranks, K parts being merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses.divergences import Divergence
from megatron_cord.losses.kernels.backend import Backend, UpstreamGrads
from megatron_cord.losses.statistics import GlobalStats, PartialStats, empty_stats, stack_stats

#: Columns of a block. Where logits are a product, a block bounds what exists at a time (on a CPU it should stay in the
#: cache, on CUDA fill the device); where they exist already, few blocks mean few calls.
BLOCK_COLUMNS = {"cpu": 2**12, "cuda": 2**13}
STORED_BLOCK_COLUMNS = 2**15


class Logits(Protocol):
    """Logits of the same tokens, not divided by the temperature."""

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        ...

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return student's and teacher's columns of the span, [N, columns]; without a teacher the student's twice."""
        ...


class StoredLogits:
    """Logits that exist: student and teacher [N, V/TP] of any floating type."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return STORED_BLOCK_COLUMNS

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return views of both tensors."""
        return self.student[:, span], self.teacher[:, span]


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns this rank holds, how the divergence is defined on them, and what computes it."""

    divergence: Divergence
    temperature: float
    start: int  #: the first column's token id
    columns: int  #: columns that are tokens; the rest of the shard is padding. 0 on a rank that is all padding
    dtype: torch.dtype  #: of the statistics: float64 if an input is, else float32
    group: dist.ProcessGroup | None  #: the ranks that share the vocabulary; None means this one alone
    backend: Backend
    sequence_parallel: bool = False  #: whether a rank needs the hidden states' gradient of its own tokens only

    def stats(self, logits: Logits, target_ids: Tensor) -> GlobalStats:
        """Return ``begin_stats``, waited for."""
        return self.begin_stats(logits, target_ids).wait()

    def begin_stats(self, logits: Logits, target_ids: Tensor) -> PendingStats:
        """Start the statistics of the whole vocabulary: one all-gather; a two-pass divergence needs a second.

        Args:
            logits: of N tokens, padding included.
            target_ids: int64 [N], token ids of the whole vocabulary.

        Returns:
            fields [N], equal on all ranks of the group. Without tokens there is no collective, on any rank.
        """
        parts = [empty_stats(target_ids.shape[0], dtype=self.dtype, device=target_ids.device)]
        top = parts[0].student_max.new_full((self.divergence.top, target_ids.shape[0]), -torch.inf)
        for span in self.blocks(logits.block_columns):
            student, teacher = logits.block(span)
            target = target_ids - self.start - span.start
            parts.append(
                self.backend.partial_stats(student, teacher, target, self.divergence, self.temperature, self.dtype)
            )
            top = self._largest(torch.cat([top, teacher.T.to(self.dtype)])) if self.divergence.top else top
        local = merge_stats(stack_stats(parts), self.divergence, self.temperature)
        return PendingStats(self, logits, self._gather(torch.cat([torch.stack(local), top])))  # [TP, 8 + k, N]

    def gradient(
        self, logits: Logits, target_ids: Tensor, stats: GlobalStats, upstream: UpstreamGrads, out: Tensor
    ) -> None:
        """Write the gradient of this rank's student logits to ``out`` [N, V/TP], 0 in the padding; no communication."""
        for span in self.blocks(logits.block_columns):
            self.block_gradient(span, *logits.block(span), target_ids, stats, upstream, out[:, span])
        out[:, self.columns :] = 0.0

    def block_gradient(
        self,
        span: slice,
        student: Tensor,
        teacher: Tensor,
        target_ids: Tensor,
        stats: GlobalStats,
        upstream: UpstreamGrads,
        out: Tensor,
    ) -> None:
        """Write the gradient of one block of columns into ``out`` [N, columns of the span]."""
        target = target_ids - self.start - span.start
        self.backend.gradient(student, teacher, target, stats, self.divergence, self.temperature, upstream, out)

    def blocks(self, size: int) -> list[slice]:
        """Return the columns that are tokens, ``size`` at a time."""
        return [slice(first, min(first + size, self.columns)) for first in range(0, self.columns, size)]

    @property
    def num_ranks(self) -> int:
        """TP."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def completed(self, gathered: Tensor, logits: Logits) -> GlobalStats:
        """Return the statistics of the whole vocabulary from those of all ranks [TP, 8 + k, N]."""
        whole = merge_stats(PartialStats(*gathered[:, :8].unbind(1)), self.divergence, self.temperature)
        threshold = self._largest(gathered[:, 8:].flatten(0, 1))[-1] if self.divergence.top else None
        stats = global_stats(whole, self.divergence, self.temperature, threshold)
        return self._second_pass(logits, stats) if self.divergence.num_sums else stats

    def _second_pass(self, logits: Logits, stats: GlobalStats) -> GlobalStats:
        """Return the statistics with a two-pass divergence and its inner scalar put in."""
        sums = stats.entropy.new_zeros(self.divergence.num_sums, len(stats.entropy))
        for span in self.blocks(logits.block_columns):
            sums += self.backend.second_sums(*logits.block(span), stats, self.divergence, self.temperature)
        divergence, inner = self.divergence.second_value(self._gather(sums).wait().sum(0))
        return stats._replace(divergence=divergence, inner=inner)

    def _largest(self, values: Tensor) -> Tensor:
        """Return the k largest of [≥ k, N], in falling order, [k, N]."""
        return values.topk(self.divergence.top, dim=0).values

    def _gather(self, mine: Tensor) -> PendingGather:
        """Start to collect every rank's part, [TP, scalars, N]."""
        if self.num_ranks == 1 or mine.numel() == 0:
            return PendingGather(mine[None], None)
        gathered = mine.new_empty(self.num_ranks * mine.shape[0], mine.shape[1])
        work = dist.all_gather_into_tensor(gathered, mine.contiguous(), group=self.group, async_op=True)
        return PendingGather(gathered.view(self.num_ranks, *mine.shape), work)


@dataclass(frozen=True)
class PendingGather:
    """An all-gather in flight."""

    result: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Return the result, complete."""
        if self.work is not None:
            self.work.wait()
        return self.result


@dataclass(frozen=True)
class PendingStats:
    """Statistics whose all-gather is in flight."""

    shard: VocabularyShard
    logits: Logits  #: of these tokens; a two-pass divergence reads them again
    gather: PendingGather

    def wait(self) -> GlobalStats:
        """Return fields [N], equal on all ranks."""
        return self.shard.completed(self.gather.wait(), self.logits)


def merge_stats(parts: PartialStats, divergence: Divergence, temperature: float) -> PartialStats:
    """Merge K parts, fields [K, N], into one, fields [N]. Associative and commutative up to rounding."""
    student_max, teacher_max = parts.student_max.amax(0), parts.teacher_max.amax(0)
    student_shift = _shift(parts.student_max, student_max, temperature)
    teacher_shift = _shift(parts.teacher_max, teacher_max, temperature)
    student_scale, teacher_scale = student_shift.exp(), teacher_shift.exp()
    entropy_sum = student_scale * (parts.entropy_sum + parts.student_sum * student_shift)
    return PartialStats(
        student_max=student_max,
        student_sum=(student_scale * parts.student_sum).sum(0),
        entropy_sum=entropy_sum.sum(0),
        divergence_sum=divergence.merged_sum(parts, student_shift, student_scale, teacher_shift, teacher_scale).sum(0),
        teacher_max=teacher_max,
        teacher_sum=(teacher_scale * parts.teacher_sum).sum(0),
        student_target=parts.student_target.amax(0),
        teacher_target=parts.teacher_target.amax(0),
    )


def global_stats(
    whole: PartialStats, divergence: Divergence, temperature: float, threshold: Tensor | None = None
) -> GlobalStats:
    """Return divergence, entropy and log-probabilities from the merged statistics of the whole vocabulary.

    A two-pass divergence is still 0 here. The divergence is not clamped: rounding may leave it near −1e-7 in float32
    where the two distributions agree.

    Args:
        whole: fields [N].
        divergence: what is compared.
        temperature: τ.
        threshold: the k-th largest teacher logit [N], where the divergence needs it.
    """
    student_log_sum, teacher_log_sum = whole.student_sum.log(), whole.teacher_sum.log()
    return GlobalStats(
        student_max=whole.student_max,
        student_log_sum=student_log_sum,
        teacher_max=whole.teacher_max,
        teacher_log_sum=teacher_log_sum,
        divergence=divergence.value(whole, student_log_sum, teacher_log_sum),
        entropy=student_log_sum - whole.entropy_sum / whole.student_sum,
        student_logprob=(whole.student_target - whole.student_max) / temperature - student_log_sum,
        teacher_logprob=(whole.teacher_target - whole.teacher_max) / temperature - teacher_log_sum,
        threshold=torch.zeros_like(student_log_sum) if threshold is None else threshold,
        inner=torch.zeros_like(student_log_sum),
    )


def _shift(maxima: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """Return (maxima − maximum) / τ; 0 where a part has no mass, for its sums are 0 too."""
    return ((maxima - maximum) / temperature).masked_fill(maxima == -torch.inf, 0.0)
