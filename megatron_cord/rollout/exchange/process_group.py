"""The way over a process group: NCCL between GPUs, gloo between CPUs. The fastest between machines.

The group is made at the first exchange and kept. When a server fails, everyone in the group loses it, and it is made anew with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cord.parallel import portability
from megatron_cord.rollout.exchange.bucket import BucketPlan
from megatron_cord.rollout.exchange.endpoint import Endpoint, ServerError, ask_each
from megatron_cord.rollout.exchange.group import ServerGroup
from megatron_cord.rollout.exchange.way import AttemptFailed


class ProcessGroupWay:
    """Broadcasts buckets from rank 0.

    Args:
        address: of the trainer's main rank, as servers reach it; found out if None.
        timeout: seconds for joining the group and for each bucket.
    """

    in_session = True

    def __init__(self, address: str | None, timeout: float) -> None:
        self._address, self._timeout = address, timeout
        self._group: ServerGroup | None = None
        self._buffers: list[Tensor] = []

    def open(self, servers: Sequence[Endpoint], nbytes: int) -> None:
        """Joins the servers, unless just these are joined already."""
        if self._group is not None and self._group.servers != tuple(servers):
            self._leave()
        if self._group is None:
            sizes, failures = ask_each(servers, lambda server: server.tensor_parallel_size(self._timeout))
            if failures:
                raise AttemptFailed(failures)
            self._group = ServerGroup(sizes, self._address, self._timeout)
        if not self._buffers or self._buffers[0].numel() < nbytes:
            self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=portability.device()) for _ in range(2)]

    def buffer(self, index: int) -> Tensor:
        """One of two, uint8 [nbytes]."""
        return self._buffers[index % 2]

    def send(self, plan: BucketPlan, buffer: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Broadcasts one bucket; returns when all servers have loaded it."""
        assert self._group is not None
        body: dict[str, object] = {
            "names": [spec.name for spec in plan.specs],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in plan.specs],
            "shapes": [list(spec.shape) for spec in plan.specs],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        self._group.broadcast(buffer[: plan.nbytes], ready, "/update_weights_from_distributed", body)
        return {}

    def finish(self) -> dict[Endpoint, ServerError]:
        """Nothing is left to do; the group stays."""
        return {}

    def abandon(self) -> None:
        """Breaks the group, and takes new buffers: an operation that was aborted may still read the old ones."""
        if self._group is not None:
            self._group.close(broken=True)
            self._group = None
        self._buffers = []

    def close(self) -> None:
        """Leaves the group and frees the buffers."""
        self._leave()
        self._buffers = []

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
