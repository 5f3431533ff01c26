"""The products around the output layer: logits that leave the GEMM in fp32, and gradients that are summed in fp32.

Logits rounded to bfloat16 spoil small divergences, so a bfloat16 product must not round its result: on CUDA the GEMM itself writes fp32, on
a CPU the operands are upcast, a block of columns at a time. Gradients of logits may be rounded (to the hidden states' type), for every product
with them averages the rounding out. Simplification: float16 gradients would underflow, so they stay fp32 and pay for it.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.losses import shard as shards
from megatron_cord.losses.shard import VocabularyShard


@dataclass(frozen=True, eq=False)
class OutputLayers:
    """Both models' last product, not yet formed."""

    student_hidden: Tensor  #: [N, H]
    student_weight: Tensor  #: [V/TP, H]
    teacher_hidden: Tensor | None  #: [N, H']; None: no teacher
    teacher_weight: Tensor | None  #: [V/TP, H']
    dtype: torch.dtype  #: of the logits

    def chunk(self, rows: slice) -> HiddenLogits:
        """The logits of these tokens, formed when asked for."""
        return HiddenLogits(self, rows)

    def student_alone(self) -> OutputLayers:
        """The same without the teacher."""
        return OutputLayers(self.student_hidden, self.student_weight, None, None, self.dtype)

    @property
    def one_weight(self) -> bool:
        """Whether student and teacher share their output weight, so that one product serves both."""
        student, teacher = self.student_weight, self.teacher_weight
        if teacher is None or self.teacher_hidden is None:
            return False
        same = student.data_ptr() == teacher.data_ptr() and student.stride() == teacher.stride() and student.shape == teacher.shape
        return same and student.dtype == teacher.dtype


class HiddenLogits:
    """``Logits`` of some tokens, each block a product."""

    def __init__(self, layers: OutputLayers, rows: slice) -> None:
        self._layers = layers
        self._student = layers.student_hidden[rows]
        self._teacher = None if layers.teacher_hidden is None else layers.teacher_hidden[rows]

    @property
    def block_columns(self) -> int:
        return shards.BLOCK_COLUMNS

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        layers = self._layers
        weight = layers.student_weight[span]
        if self._teacher is None or layers.teacher_weight is None:
            student = product(self._student, weight, layers.dtype)
            return student, student
        if layers.one_weight:
            both = product(torch.cat([self._student, self._teacher]), weight, layers.dtype)
            return both[: len(self._student)], both[len(self._student) :]
        return product(self._student, weight, layers.dtype), product(self._teacher, layers.teacher_weight[span], layers.dtype)


class KeptLogits:
    """``Logits`` of some tokens, each block a product that is formed once and kept."""

    def __init__(self, logits: HiddenLogits) -> None:
        self._logits = logits
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def block_columns(self) -> int:
        return self._logits.block_columns

    def block(self, span: slice) -> tuple[Tensor, Tensor]:
        if span.start not in self._blocks:
            self._blocks[span.start] = self._logits.block(span)
        return self._blocks[span.start]


class HiddenGradient:
    """∂L/∂student_hidden, [N, H], summed over columns here and over ranks while the next chunk is computed."""

    def __init__(self, hidden: Tensor, shard: VocabularyShard) -> None:
        self.total = torch.zeros(hidden.shape, dtype=shard.dtype, device=hidden.device)
        self._shard = shard
        self._sums = shard.num_ranks > 1 and shard.sums_hidden_gradient and self.total.numel() > 0
        self._pending: list[dist.Work] = []

    def add(self, rows: slice, logits_gradient: Tensor, weight: Tensor) -> None:
        """Adds logits_gradient [C, columns] · weight [columns, H]."""
        add_product(self.total[rows], logits_gradient, weight)

    def reduce(self, rows: slice) -> None:
        """Starts to sum finished rows over the ranks; NCCL does so on a stream of its own."""
        if self._sums:
            self._pending.append(dist.all_reduce(self.total[rows], group=self._shard.group, async_op=True))

    def scaled(self, scale: Tensor) -> HiddenGradient:
        """This, not yet summed over ranks, times a scalar."""
        other = HiddenGradient(self.total, self._shard)
        torch.mul(self.total, scale, out=other.total)
        return other

    def result(self, dtype: torch.dtype) -> Tensor:
        """The gradient, when all that was started is done."""
        for work in self._pending:
            work.wait()
        return self.total.to(dtype)


class WeightGradient:
    """∂L/∂student_weight of this rank's shard, [V/TP, H], summed in fp32.

    Megatron's DistributedDataParallel gives a parameter an fp32 ``main_grad``. Where there is one the sum goes straight into it, as
    Megatron's own fused layers do: ``grad_added_to_main_grad`` says so, and autograd gets zeros without memory, to which a tied embedding's
    gradient may be added. With ``span_by_span`` the caller adds each span once, with ``add_span``, and the whole is in the weight's type.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, span_by_span: bool = False) -> None:
        self._weight, self._dtype = weight, dtype
        main_grad = getattr(weight, "main_grad", None)
        self._in_place = main_grad is not None and main_grad.dtype == dtype and hasattr(weight, "grad_added_to_main_grad")
        own = weight.dtype if span_by_span else dtype
        self.total: Tensor = main_grad if self._in_place else torch.zeros(weight.shape, dtype=own, device=weight.device)  # type: ignore[assignment]

    def add(self, span: slice, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Adds logits_gradient [C, columns]ᵀ · hidden [C, H] to the rows of the span."""
        add_product(self.total[span], logits_gradient.T, hidden)

    def add_span(self, span: slice, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Adds all tokens' part of the span's rows, given as pairs as in ``add``: the sum is in fp32, and no more than the span is."""
        sum_of_parts = torch.zeros(span.stop - span.start, self.total.shape[1], dtype=self._dtype, device=self.total.device)
        for logits_gradient, hidden in parts:
            add_product(sum_of_parts, logits_gradient.T, hidden)
        self.total[span] += sum_of_parts

    def add_scaled(self, total: Tensor, scale: Tensor) -> None:
        """Adds a finished sum [V/TP, H] times a scalar."""
        self.total.addcmul_(total, scale)

    def result(self) -> Tensor:
        """What autograd gets."""
        if not self._in_place:
            return self.total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self._weight.new_zeros(()).expand(self._weight.shape)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [C, H] · right [K, H]ᵀ in ``dtype``, never rounded to a smaller one; [C, K]."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left.to(dtype) @ right.to(dtype).T


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right; operands of a smaller type than the sum's are multiplied in that type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right.to(total.dtype))
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


def gradient_dtype(hidden: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of logits are kept: bfloat16 where the hidden states are, else that of the logits."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and logits_dtype == torch.float32 else logits_dtype


def chunks_of(num_tokens: int, chunk: int, cu_seqlens: list[int] | None = None) -> list[slice]:
    """Slices of at most ``chunk`` tokens; one empty slice if there are no tokens.

    Args:
        cu_seqlens: cut only between these sequences, where a single one may be longer than ``chunk``.
    """
    if cu_seqlens is None:
        borders = [*range(0, max(num_tokens, 1), chunk), num_tokens]
    else:
        borders = [0]
        for end, following in itertools.pairwise([*cu_seqlens[1:], None]):
            if end is not None and end > borders[-1] and (following is None or following - borders[-1] > chunk):
                borders.append(end)
        if len(borders) == 1:
            borders.append(num_tokens)
    return [slice(first, last) for first, last in itertools.pairwise(borders)]
