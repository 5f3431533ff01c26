"""The transport over a process group: NCCL between GPUs, gloo between CPUs. The fastest between machines.

The group is made at the first weight sync and kept. When a server fails, all members lose the group, and it is made
anew with the others.

Servers that this project starts take a stream: one request announces all tensors, and buckets of some MiB, or of one
    large
tensor where it lies, follow one another. If any of the servers is another one, each bucket has a request of its own,
and should be large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each
from megatron_cord.rollout.sglang.plugin.lora_merge import LORA
from megatron_cord.rollout.sglang.plugin.weights import STREAMED
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan, TwoBuffers
from megatron_cord.rollout.sglang.weight_sync.group import ServerGroup
from megatron_cord.rollout.sglang.weight_sync.transport import AttemptFailedError

_STREAM_BYTES = 32 << 20  #: of a bucket in a stream; larger tensors need not be copied together
_UPDATE = "/update_weights_from_distributed"


class ProcessGroupTransport:
    """Broadcasts buckets from rank 0.

    Args:
        address: of the trainer's main rank, as servers reach it; found out if None.
        timeout: seconds for joining the group and for each bucket.
        stream: use streams where all servers take them.
    """

    in_session = True
    borrows = True

    def __init__(self, address: str | None, timeout: float, stream: bool = True) -> None:
        self._address, self._timeout, self._stream = address, timeout, stream
        self._group: ServerGroup | None = None
        self._streams = False
        self._buffers = TwoBuffers()

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        """Make a group with the servers, unless there is one of just these."""
        if self._group is not None and self._group.servers != tuple(servers):
            self._leave()
        if self._group is None:
            abilities, failures = call_each(servers, lambda server: server.abilities(self._timeout))
            if failures:
                raise AttemptFailedError(failures)
            self._streams = self._stream and all(found.streams for found in abilities.values())
            ranks = {server: found.ranks for server, found in abilities.items()}
            self._group = ServerGroup(ranks, self._address, self._timeout)
        return min(bucket_bytes, _STREAM_BYTES) if self._streams else bucket_bytes

    def merges(self, servers: Sequence[Endpoint], base: str) -> bool:
        """Return whether all servers take streams and run a checkpoint with these weights."""
        abilities, failures = call_each(servers, lambda server: server.abilities(self._timeout))
        same = all(found.streams and found.base == base for found in abilities.values())
        return self._stream and not failures and same

    def start(self, plans: Sequence[BucketPlan], lora_scale: float | None = None) -> None:
        """Announce a stream."""
        assert self._streams or lora_scale is None, "only servers that take streams merge LoRA"
        if self._streams:
            scale = "" if lora_scale is None else f"{LORA}{lora_scale!r}"
            self._announce(plans, STREAMED + ",".join(str(len(plan.specs)) for plan in plans) + scale)

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """Return one of two, uint8 [≥ nbytes]."""
        return self._buffers.get(index, nbytes)

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Broadcast one bucket; return when all servers have received it."""
        assert self._group is not None
        if not self._streams:
            self._announce([plan], "flattened_bucket")
        self._group.broadcast(flat, ready)
        if not self._streams:
            self._group.wait_for_answers()
        return {}

    def finish(self) -> dict[Endpoint, ServerError]:
        """Wait until all servers have loaded everything, on CUDA queued it on their device. The group stays."""
        assert self._group is not None
        self._group.wait_for_answers()
        return {}

    def abandon(self) -> None:
        """Break the group, and take new buffers: an operation that was aborted may still read the old ones."""
        if self._group is not None:
            self._group.abandon()
            self._group = None
        self._buffers = TwoBuffers()

    def close(self) -> None:
        """Leave the group and free the buffers."""
        self._leave()
        self._buffers = TwoBuffers()

    def _announce(self, plans: Sequence[BucketPlan], load_format: str) -> None:
        assert self._group is not None
        specs = [spec for plan in plans for spec in plan.specs]
        body: dict[str, object] = {
            "names": [spec.name for spec in specs],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "load_format": load_format,
            "flush_cache": False,
        }
        self._group.announce(_UPDATE, body, self._timeout * len(plans))

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
