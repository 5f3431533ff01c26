"""Many tensors in one flat buffer: what is sent at once. Sending tensor by tensor costs a request and a reply for each.

A bucket's plan is known before any tensor is gathered, so two buffers of the largest bucket's size are all the memory an exchange needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class TensorSpec:
    """A tensor on paper.

    Attributes:
        name: as published.
        shape: sizes.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BucketPlan:
    """Tensors that lie one behind the other in one buffer.

    Attributes:
        specs: in the order of their bytes; dtypes as they are sent.
        starts: the first byte of each.
        nbytes: of all.
    """

    specs: tuple[TensorSpec, ...]
    starts: tuple[int, ...]
    nbytes: int

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each tensor as a view of the buffer, uint8 [≥ nbytes]."""
        places = zip(self.specs, self.starts, strict=True)
        return {spec.name: buffer[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape) for spec, start in places}


def plan_buckets(specs: Sequence[TensorSpec], max_bytes: int) -> list[BucketPlan]:
    """Cuts the tensors, in their order, into buckets of at most max_bytes; a larger tensor has a bucket of its own.

    A bucket also ends where the next tensor would start at a byte that its dtype cannot start at: servers lay tensors without gaps.
    """
    buckets: list[BucketPlan] = []
    group: list[TensorSpec] = []
    starts: list[int] = []
    size = 0
    for spec in specs:
        if group and (size + spec.nbytes > max_bytes or size % spec.dtype.itemsize):
            buckets.append(BucketPlan(tuple(group), tuple(starts), size))
            group, starts, size = [], [], 0
        group.append(spec)
        starts.append(size)
        size += spec.nbytes
    if group:
        buckets.append(BucketPlan(tuple(group), tuple(starts), size))
    return buckets


@torch.no_grad()
def fill(plan: BucketPlan, tensors: Iterator[tuple[str, Tensor]], buffer: Tensor, *, borrow: bool = False) -> Tensor:
    """Takes the bucket's tensors from the stream into the buffer, uint8 [≥ nbytes], each brought to the dtype that is sent.

    Args:
        plan: what is wanted.
        tensors: the stream.
        buffer: where they go.
        borrow: a bucket's only tensor need not be copied.

    Returns:
        uint8 [nbytes]: the buffer's part, or the tensor's own memory.

    Raises:
        CordError: the stream brings something else than was planned.
    """
    views = plan.views(buffer)
    for name, view in views.items():
        given = next(tensors, None)
        if given is None or given[0] != name or not _fits(given[1], view):
            found = "nothing" if given is None else f"{given[0]} {list(given[1].shape)}"
            raise CordError(
                f"weight exchange: {name} {list(view.shape)} was planned but {found} came; the model changed since it was planned"
            )
        alike = given[1].dtype == view.dtype and given[1].device == view.device
        if borrow and len(views) == 1 and alike and given[1].is_contiguous():
            return given[1].detach().reshape(-1).view(torch.uint8)
        view.view(given[1].shape).copy_(given[1])
    return buffer[: plan.nbytes]


def _fits(given: Tensor, planned: Tensor) -> bool:
    """Whether the shapes are the same, or would be without a cut into pieces."""
    return (
        given.shape == planned.shape
        or given.dim() == planned.dim() + 1
        and (given.shape[0] * given.shape[1], *given.shape[2:]) == planned.shape
    )
