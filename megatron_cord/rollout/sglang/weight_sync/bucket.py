"""Many tensors in one flat buffer: what is sent at once. Sending tensor by tensor costs a request and a reply for each.

Beside the model a weight sync needs two buffers of a bucket, and what gathering the tensors takes: a tensor that has a
    bucket
of its own may be sent from where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.rollout.sglang.plugin.lora_merge import FACTORS
from megatron_cord.rollout.types import TensorSpec


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
        """Return each tensor as a view of the buffer, uint8 [≥ nbytes]."""
        return {
            spec.name: buffer[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)
            for spec, start in zip(self.specs, self.starts, strict=True)
        }


def plan_buckets(specs: Sequence[TensorSpec], max_bytes: int) -> list[BucketPlan]:
    """Divide the tensors, in their order, into buckets of at most max_bytes; a larger one has a bucket of its own.

    A bucket also ends where the next tensor would start at a byte that its dtype cannot start at: servers lay tensors
    without gaps. A and B of LoRA, of one dtype, are not parted: servers may load each bucket by itself.
    """
    buckets: list[BucketPlan] = []
    group: list[TensorSpec] = []
    starts: list[int] = []
    size = 0
    for together in _pairs(specs):
        nbytes = sum(spec.nbytes for spec in together)
        if group and (size + nbytes > max_bytes or size % together[0].dtype.itemsize):
            buckets.append(BucketPlan(tuple(group), tuple(starts), size))
            group, starts, size = [], [], 0
        for spec in together:
            group.append(spec)
            starts.append(size)
            size += spec.nbytes
    if group:
        buckets.append(BucketPlan(tuple(group), tuple(starts), size))
    return buckets


def _pairs(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Yield each tensor, and A of LoRA with the B behind it."""
    pending = list(reversed(specs))
    while pending:
        together = [pending.pop()]
        module = together[0].name.removesuffix(FACTORS[0])
        if pending and pending[-1].name == f"{module}{FACTORS[1]}":
            together.append(pending.pop())
        yield together


@torch.no_grad()
def fill(
    plan: BucketPlan, tensors: Iterator[tuple[str, Tensor]], buffer: Callable[[], Tensor], *, borrow: bool = False
) -> Tensor:
    """Take the bucket's tensors from the stream into a buffer, each brought to the dtype that is sent.

    Args:
        plan: which tensors.
        tensors: the stream.
        buffer: returns where they go, uint8 [≥ nbytes].
        borrow: a bucket's only tensor need not be copied.

    Returns:
        uint8 [nbytes]: the buffer's part, or the tensor's own memory.

    Raises:
        CordError: the stream's tensors are not those that were planned.
    """
    flat, views = None, {}
    for spec in plan.specs:
        given = next(tensors, None)
        if given is None or given[0] != spec.name or not _fits(given[1], spec.shape):
            found = "nothing" if given is None else f"{given[0]} {list(given[1].shape)}"
            raise CordError(
                f"weight sync: {spec.name} {list(spec.shape)} was planned but {found} came; "
                "the model changed since it was planned"
            )
        if borrow and len(plan.specs) == 1 and given[1].dtype == spec.dtype and given[1].is_contiguous():
            return given[1].detach().reshape(-1).view(torch.uint8)
        if flat is None:
            flat = buffer()[: plan.nbytes]
            views = plan.views(flat)
        views[spec.name].view(given[1].shape).copy_(given[1])
    assert flat is not None, "a bucket has tensors"
    return flat


def _fits(given: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether the shapes are the same, or would be if the given tensor were not in pieces."""
    in_pieces = len(shape) > 0 and given.dim() == len(shape) + 1
    return given.shape == shape or (in_pieces and (given.shape[0] * given.shape[1], *given.shape[2:]) == shape)


class TwoBuffers:
    """Memory on this process's device for the bucket that is sent and the one that is put together."""

    def __init__(self) -> None:
        self._pair = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def get(self, index: int, nbytes: int) -> Tensor:
        """Return uint8 [≥ nbytes] for bucket number `index`; that of bucket index − 2, unless it is too small."""
        if self._pair[index % 2].numel() < nbytes:
            self._pair[index % 2] = torch.empty(nbytes, dtype=torch.uint8, device=portability.device())
        return self._pair[index % 2]
