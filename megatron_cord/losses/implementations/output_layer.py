"""Logits in fp32 from hidden states and output weights, by chunks of tokens and blocks of columns.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_cord.losses import shard as shards
from megatron_cord.losses.kernels.matmul import product
from megatron_cord.losses.shard import Logits, PendingStats, VocabularyShard
from megatron_cord.losses.statistics import GlobalStats

#: Logits of the chunks in flight (32 MiB of float32 on a CPU, 512 MiB on CUDA, where a GEMM of few rows is slow): as
#: many tokens as fit.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


class Scratch:
    """Memory that is written to again and again: on a CPU new pages for every block cost as much time as a product."""

    def __init__(self) -> None:
        self._memory: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [rows, columns], contiguous, uninitialised; invalidates what was taken by that name before."""
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * columns or memory.dtype != dtype:
            memory = self._memory[name] = torch.empty(rows * columns, dtype=dtype, device=device)
        return memory[: rows * columns].view(rows, columns)


@dataclass(frozen=True, eq=False)
class OutputLayers:
    """Both models' last product, not yet formed."""

    student_hidden: Tensor  #: [N, H]
    student_weight: Tensor  #: [V/TP, H]
    teacher_hidden: Tensor | None  #: [N, H']; None: no teacher
    teacher_weight: Tensor | None  #: [V/TP, H']
    dtype: torch.dtype  #: of the logits
    scratch: Scratch = field(default_factory=Scratch)

    def chunk(self, rows: slice) -> HiddenLogits:
        """Return the logits of these tokens, formed on demand; a block lives until the next one is formed."""
        return HiddenLogits(self, rows)

    @property
    def block_columns(self) -> int:
        """Columns to form at a time."""
        return shards.BLOCK_COLUMNS.get(self.student_hidden.device.type, shards.BLOCK_COLUMNS["cpu"])

    @property
    def one_weight(self) -> bool:
        """Whether student and teacher share their output weight, so that one product serves both."""
        student, teacher = self.student_weight, self.teacher_weight
        if teacher is None or self.teacher_hidden is None:
            return False
        same = (
            student.untyped_storage()._cdata == teacher.untyped_storage()._cdata
            and student.storage_offset() == teacher.storage_offset()
            and student.stride() == teacher.stride()
            and student.shape == teacher.shape
        )
        return same and student.dtype == teacher.dtype


class HiddenLogits:
    """``Logits`` of some tokens, each block a product."""

    def __init__(self, layers: OutputLayers, rows: slice) -> None:
        self._layers = layers
        self._student = layers.student_hidden[rows]
        self._teacher = None if layers.teacher_hidden is None else layers.teacher_hidden[rows]

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self._layers.block_columns

    def block(self, span: slice, keep_as: Hashable = None) -> tuple[Tensor, Tensor]:
        """Form the student's and the teacher's columns of the span.

        Args:
            span: the columns.
            keep_as: names the block, which then lives until another one of the same name is formed.
        """
        layers = self._layers
        weight = layers.student_weight[span]
        if self._teacher is None or layers.teacher_weight is None:
            student = self._product("student", self._student, weight, keep_as)
            return student, student
        if layers.one_weight:
            both = self._product("both", torch.cat([self._student, self._teacher]), weight, keep_as)
            return both[: len(self._student)], both[len(self._student) :]
        teacher = self._product("teacher", self._teacher, layers.teacher_weight[span], keep_as)
        return self._product("student", self._student, weight, keep_as), teacher

    def _product(self, model: str, hidden: Tensor, weight: Tensor, keep_as: Hashable) -> Tensor:
        layers = self._layers
        out = layers.scratch.take((model, keep_as), len(hidden), len(weight), layers.dtype, hidden.device)
        return product(hidden, weight, layers.dtype, out)


class KeptLogits:
    """``Logits`` of some tokens, each block formed once and kept until another chunk takes the same place."""

    def __init__(self, logits: HiddenLogits, place: int = 0) -> None:
        self._logits, self._place = logits, place
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self._logits.block_columns

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return the block, formed at the first call."""
        if span.start not in self._blocks:
            self._blocks[span.start] = self._logits.block(span, (self._place, span.start))
        return self._blocks[span.start]


def iter_chunks(
    shard: VocabularyShard, layers: OutputLayers, target_ids: Tensor, chunks: list[slice], *, keep: bool
) -> Iterator[tuple[slice, Logits, GlobalStats]]:
    """Yield each chunk's tokens, logits and statistics.

    A chunk's all-gather runs while the next chunk's products are formed. All implementations go through here, so ranks
    that choose differently make the same collectives in the same order.

    Args:
        shard: this rank's part of the vocabulary.
        layers: both models' output layers.
        target_ids: [N].
        chunks: the tokens of each chunk.
        keep: whether the logits shall still exist when they are yielded, until the next chunk is.
    """
    limit = chunks_in_flight(shard.num_ranks)
    in_flight = deque[tuple[slice, Logits, PendingStats]]()
    for number, rows in enumerate(chunks):
        logits: Logits = layers.chunk(rows)
        if keep or shard.divergence.num_sums:
            logits = KeptLogits(layers.chunk(rows), place=number % limit)
        in_flight.append((rows, logits, shard.begin_stats(logits, target_ids[rows])))
        if len(in_flight) == limit:
            rows, logits, pending = in_flight.popleft()
            yield rows, logits, pending.wait()
    for rows, logits, pending in in_flight:
        yield rows, logits, pending.wait()


def chunks_in_flight(num_ranks: int) -> int:
    """Return how many chunks' logits may exist at a time: two where there is communication to wait for."""
    return 2 if num_ranks > 1 else 1


def tokens_per_chunk(weight: Tensor, num_ranks: int) -> int:
    """Return how many tokens' logits [V/TP] fit into the memory of a chunk."""
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"]) // chunks_in_flight(num_ranks)
    return max(1, elements // max(1, weight.shape[0]))


def split_chunks(num_tokens: int, chunk: int, cu_seqlens: list[int] | None = None) -> list[slice]:
    """Return slices of at most ``chunk`` tokens; one empty slice if there are no tokens.

    Args:
        num_tokens: N.
        chunk: tokens of a chunk.
        cu_seqlens: split only between these sequences, where a single one may be longer than ``chunk``.
    """
    if cu_seqlens is None:
        ends = [*range(0, max(num_tokens, 1), chunk), num_tokens]
    else:
        ends = [0]
        for end, following in itertools.pairwise([*cu_seqlens[1:], None]):
            if end is not None and end > ends[-1] and (following is None or following - ends[-1] > chunk):
                ends.append(end)
        if len(ends) == 1:
            ends.append(num_tokens)
    return [slice(first, last) for first, last in itertools.pairwise(ends)]
