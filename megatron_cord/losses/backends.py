"""Who does the arithmetic on a block of logits: eager torch, torch.compile, or Triton kernels, behind one interface.

All compute the formulas of ``statistics``. Eager torch is the readable one; on a CPU it works on a few rows at a time, so that its many small
steps stay in the cache. torch.compile fuses those steps. Triton kernels do each pass in one sweep (``triton_backend``).

Shapes: N tokens; a block is [N, columns] of any floating type, computed in ``totals``' type.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.kinds import Kind
from megatron_cord.losses.statistics import Statistics, Totals, block_statistics, gradient_block, second_sums

logger = logging.getLogger(__name__)

#: By the name that configuration and the public functions use.
BACKENDS = ("auto", "eager", "compile", "triton")

#: Logits of a call from which "auto" compiles on a CPU. Compiled, this many take half a second less (benchmarks.loss); compiling takes some
#: ten seconds once a process, which twenty such calls pay for. A test's or a small model's call has far fewer.
COMPILE_ELEMENTS = 2**24

#: Elements that eager torch works on at a time on a CPU: 128 KiB of float32, so that the steps of a formula share the second-level cache.
TILE_ELEMENTS = 2**15

#: Gradients that arrived at divergence, entropy and log-probability, each [N]; None where the loss does not use one.
Weights = tuple[Tensor | None, Tensor | None, Tensor | None]

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


class Backend(Protocol):
    """``student`` and ``teacher`` are one block of logits; ``target`` int64 [N] is the column of the token within the block."""

    def statistics(
        self, student: Tensor, teacher: Tensor, target: Tensor, kind: Kind, temperature: float, dtype: torch.dtype
    ) -> Statistics:
        """The block's eight scalars, each [N], in ``dtype``."""
        ...

    def second_sums(self, student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Tensor:
        """A two-pass kind's sums, [sums, N]."""
        ...

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        totals: Totals,
        kind: Kind,
        temperature: float,
        weights: Weights,
        out: Tensor,
    ) -> None:
        """Writes the gradient of the block's student logits into ``out`` [N, columns], rounded to its type; it may be ``student`` itself."""
        ...


class EagerBackend:
    """Plain torch: ``statistics``' functions on tiles of rows; ``transform`` may replace each function by a faster equal one."""

    def __init__(self, transform: Transform = lambda function: function, tile: int = TILE_ELEMENTS) -> None:
        self._tile = tile
        self._statistics: Callable[..., Statistics] = transform(_upcast_statistics)
        self._second_sums: Callable[..., Tensor] = transform(_upcast_second_sums)
        self._gradient: Callable[..., None] = transform(_upcast_gradient)

    def statistics(
        self, student: Tensor, teacher: Tensor, target: Tensor, kind: Kind, temperature: float, dtype: torch.dtype
    ) -> Statistics:
        parts = [
            self._statistics(student[rows], teacher[rows], target[rows], kind, temperature, dtype)
            for rows in self._tiles(student)
        ]
        return parts[0] if len(parts) == 1 else Statistics(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def second_sums(self, student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Tensor:
        tiles = self._tiles(student)
        parts = [
            self._second_sums(student[rows], teacher[rows], _rows(totals, rows), kind, temperature) for rows in tiles
        ]
        return torch.cat(parts, dim=1)

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        totals: Totals,
        kind: Kind,
        temperature: float,
        weights: Weights,
        out: Tensor,
    ) -> None:
        for rows in self._tiles(student):
            mine = weights_of(weights, rows)
            self._gradient(
                student[rows], teacher[rows], target[rows], _rows(totals, rows), kind, temperature, mine, out[rows]
            )

    def _tiles(self, block: Tensor) -> Iterator[slice]:
        num_tokens, columns = block.shape
        step = max(1, num_tokens) if block.is_cuda else max(1, self._tile // max(1, columns))
        return (slice(first, min(first + step, num_tokens)) for first in range(0, max(num_tokens, 1), step))


def backend_named(name: str, device: torch.device, elements: int = 0) -> Backend:
    """The backend of that name for tensors on the device.

    "auto" is triton on CUDA where it is installed. On a CPU it is compile for calls of so many logits that compiling pays, where there is a
    compiler, else eager: a function of the call alone, so that a run repeats itself to the bit.

    Args:
        elements: logits of the call, N · V/TP.

    Raises:
        CordError: an unknown name, or triton where it is not installed or cannot run.
    """
    if name not in BACKENDS:
        raise CordError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "auto":
        if device.type == "cuda" and _triton_is_installed():
            name = "triton"
        else:
            name = "compile" if device.type == "cpu" and elements >= COMPILE_ELEMENTS and _has_compiler() else "eager"
        _announce(name)
    if name == "triton":
        if not _triton_is_installed():
            raise CordError(
                "backend triton needs the package triton, which is not installed here; choose eager or compile"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise CordError(f"backend triton needs CUDA tensors, but these are on {device}; choose eager or compile")
        return _triton()
    return _compiled() if name == "compile" else EagerBackend()


def weights_of(weights: Weights, rows: slice) -> Weights:
    """Those of some tokens."""
    divergence, entropy, logprob = (None if weight is None else weight[rows] for weight in weights)
    return divergence, entropy, logprob


def _rows(totals: Totals, rows: slice) -> Totals:
    return Totals(*(field[rows] for field in totals))


def _upcast_statistics(
    student: Tensor, teacher: Tensor, target: Tensor, kind: Kind, temperature: float, dtype: torch.dtype
) -> Statistics:
    return block_statistics(student.to(dtype), teacher.to(dtype), target, kind, temperature)


def _upcast_second_sums(student: Tensor, teacher: Tensor, totals: Totals, kind: Kind, temperature: float) -> Tensor:
    dtype = totals.entropy.dtype
    return second_sums(student.to(dtype), teacher.to(dtype), totals, kind, temperature)


def _upcast_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    totals: Totals,
    kind: Kind,
    temperature: float,
    weights: Weights,
    out: Tensor,
) -> None:
    dtype = totals.entropy.dtype
    out.copy_(gradient_block(student.to(dtype), teacher.to(dtype), target, totals, kind, temperature, *weights))


def _triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def _announce(name: str) -> None:
    """Says each choice once a process."""
    logger.info("divergence: backend %s", name)


@cache
def _triton() -> Backend:
    from megatron_cord.losses.triton_backend import TritonBackend

    return TritonBackend()


@cache
def _compiled() -> Backend:
    return EagerBackend(_compile, tile=2**24)  # fused steps need no small tiles, and calls cost time


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for these few functions, also where the process has switched compilation off for everybody else."""
    disabled = os.environ.pop("TORCHDYNAMO_DISABLE", None)
    try:
        return torch.compile(function, dynamic=True)
    finally:
        if disabled is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = disabled
