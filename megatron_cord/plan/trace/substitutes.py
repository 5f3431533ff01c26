"""What a trace replaces of the product, all in one place: what needs files, numbers, a GPU or other ranks.

Each replacement has the shapes, the memory and the products of what it stands for on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_cord.losses import shard
from megatron_cord.losses.divergences import Divergence
from megatron_cord.losses.implementations import choice, inputs, output_layer
from megatron_cord.losses.kernels import matmul
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.statistics import GlobalStats, PartialStats
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.model.layers import attention, experts
from megatron_cord.parallel import huge_pages, layout, portability
from megatron_cord.parallel.stage_messages import Channels
from megatron_cord.plan.trace.counting import CountingMode
from megatron_cord.trainer import model_setup
from megatron_cord.trainer.step import teacher
from megatron_cord.trainer.step.loss_over_stages import JointLosses


class ShapedBackend:
    """``Backend`` with the Triton kernels' inputs and outputs: they read a block once and keep nothing else."""

    def partial_stats(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        divergence: Divergence,
        temperature: float,
        dtype: torch.dtype,
    ) -> PartialStats:
        """Return eight scalars a token, [N]."""
        return PartialStats(*(student.new_empty(len(student), dtype=dtype) for _ in PartialStats._fields))

    def second_sums(
        self, student: Tensor, teacher: Tensor, stats: GlobalStats, divergence: Divergence, temperature: float
    ) -> Tensor:
        """Return the second pass's sums, [sums, N]."""
        return student.new_empty(divergence.num_sums, len(student), dtype=stats.entropy.dtype)

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
        """Leave ``out`` [N, columns] as it is: the kernel writes there and nowhere else."""


class FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA's kernel has it: of its input [..., H] it keeps that, and a number in fp32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return the shape of the input."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shapes of both inputs."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _separate_channels(pp_group: dist.ProcessGroup, timeout: timedelta) -> Channels:
    """Return channels of this rank's pipeline without the others'."""
    ranks = dist.get_process_group_ranks(pp_group)
    activations, gradients = (dist.new_group(ranks, timeout=timeout) for _ in range(2))
    return (activations,), (gradients,)


@contextmanager
def substituted(
    mode: CountingMode, arch: Architecture, teachers: Mapping[str, Architecture], memory: float
) -> Iterator[None]:
    """Replace, within the context, what a trace cannot run.

    Args:
        mode: counts.
        arch: of the student.
        teachers: of those with a checkpoint of their own, by what names it.
        memory: bytes of the GPU, for choices that depend on what is free.
    """

    def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Stand for the product of 16-bit matrices with a float32 result, which a GPU's GEMM writes by itself."""
        mode.add_flops(2.0 * len(left) * len(right) * left.shape[1])
        return out

    def norm(_: int, __: Tensor, tensors: list[list[Tensor]], *___: Any) -> tuple[Tensor, None]:
        """Stand for the fused kernel of the gradients' norm, [1]."""
        return tensors[0][0].new_empty(1), None

    route = experts.RecordedRouter.routing

    def route_evenly(self: Any, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return a router's probabilities, and a choice of all experts in turn, whose numbers are known, [T, E]."""
        probs, _ = route(self, logits, *arguments, **options)
        rows, count = probs.shape
        turns = (torch.arange(rows)[:, None] * self.topk + torch.arange(self.topk)) % count
        return probs, torch.zeros(rows, count, dtype=torch.bool).scatter_(1, turns, True)

    def nothing(*_: Any, **__: Any) -> None:
        """Do nothing."""

    replaced: list[tuple[object, str, Any]] = [
        # Weights have no numbers, so no files are read.
        (model_setup, "read_into", nothing),
        (teacher, "read_into", nothing),
        (model_setup, "load_architecture", lambda _: arch),
        (teacher, "load_architecture", teachers.__getitem__),
        # Moving would take fake parameters' marks from them, and there is one device.
        (LALM, "to", lambda self, *_, **__: self),
        # Without a GPU, torch forms this norm step by step in fp32 and keeps the steps.
        (torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight)),  # type: ignore[no-untyped-call]
        # A GPU's kernel takes short sequences, too.
        (attention, "is_small", lambda *_: False),
        (experts.RecordedRouter, "routing", route_evenly),
        (experts.RoutingRecord, "take", lambda *_: {}),
        # What the loss takes of a GPU.
        (inputs, "choose_backend", lambda *_, **__: ShapedBackend()),
        (JointLosses, "form", mode.within("loss", JointLosses.form)),
        (matmul, "multiplies_bfloat16", lambda: True),
        (matmul, "bfloat16_product", lambda: product),
        (choice, "free_bytes", lambda _: max(0, int(memory - mode.bytes))),
        (huge_pages, "_madvise", lambda: None),
        # The fused kernels of gradient clipping; without a GPU, Megatron has slow ones that read numbers.
        (clip_grads, "l2_norm_impl", norm),
        (clip_grads, "multi_tensor_scale_impl", nothing),
        # Groups of the one backend that needs no other ranks.
        (portability, "needs_gloo_groups", lambda: False),
        (layout, "_replica_group", lambda _, solo: solo),
        (layout, "_channels", _separate_channels),
    ]
    tables = (output_layer.CHUNK_ELEMENTS, shard.BLOCK_COLUMNS)
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    sizes = [table["cpu"] for table in tables]
    try:
        for owner, name, replacement in replaced:
            setattr(owner, name, replacement)
        for table in tables:
            table["cpu"] = table["cuda"]
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        for table, size in zip(tables, sizes, strict=True):
            table["cpu"] = size
