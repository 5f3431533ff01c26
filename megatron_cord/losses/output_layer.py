"""Logits formed from hidden states and output weights, a block of columns of a chunk of tokens at a time, in fp32.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_cord.losses import shard as shards
from megatron_cord.losses.products import product


class Scratch:
    """Memory that is written to again and again: on a CPU new pages for every block cost as much time as a product."""

    def __init__(self) -> None:
        self._memory: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns], contiguous, with anything in it; what was taken by that name before must not be used any more."""
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
        """The logits of these tokens, formed when asked for; a block lives until the next one is asked for."""
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
            student.data_ptr() == teacher.data_ptr()
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
        return self._layers.block_columns

    def block(self, span: slice, keep_as: Hashable = None) -> tuple[Tensor, Tensor]:
        """Args: keep_as: names the block, which then lives until one of the same name is asked for."""
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

    def _product(self, who: str, hidden: Tensor, weight: Tensor, keep_as: Hashable) -> Tensor:
        layers = self._layers
        out = layers.scratch.take((who, keep_as), len(hidden), len(weight), layers.dtype, hidden.device)
        return product(hidden, weight, layers.dtype, out)


class KeptLogits:
    """``Logits`` of some tokens, each block a product that is formed once and kept until another chunk takes the same place."""

    def __init__(self, logits: HiddenLogits, place: int = 0) -> None:
        self._logits, self._place = logits, place
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def block_columns(self) -> int:
        return self._logits.block_columns

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        if span.start not in self._blocks:
            self._blocks[span.start] = self._logits.block(span, (self._place, span.start))
        return self._blocks[span.start]
