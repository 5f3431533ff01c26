"""The transport for servers on the trainer's own machine: they map the trainer's buffer, and only its address is sent.

On CPU the buffer is a named piece of shared memory; on CUDA it is device memory behind an IPC handle. The address
travels in the form that SGLang reads, a pickle that is made here from our own values. Nothing that a server answers is
ever unpickled.

A buffer is used again only when no server can still read it. On the CPU that is when all have answered. On CUDA a
server may answer while its copy still runs: every bucket gets new memory, and torch keeps the old alive until the
server's own release of it, which waits for the copy.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_cord.parallel import portability
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each, without
from megatron_cord.rollout.sglang.plugin.lora_merge import LORA
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan
from megatron_cord.rollout.sglang.weight_sync.transport import AttemptFailedError, merge_without_streams

_DEVICE = 6  #: the place of the device's number in what torch sends of a CUDA tensor


class SharedMemoryTransport:
    """Lets servers copy from the trainer's memory.

    Args:
        timeout: seconds for a server to copy one bucket.
    """

    in_session = True
    borrows = False

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._ranks: dict[Endpoint, int] = {}
        self._servers: list[Endpoint] = []
        self._nbytes, self._lora = 0, ""
        self._buffers: list[Tensor] = []

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        """Read the servers' tensor-parallel sizes."""
        away = {
            s: ServerError(f"{s.url} is not on this machine; set rollout.weight_sync.transport=process_group")
            for s in servers
            if not s.is_local
        }
        unknown = [server for server in without(servers, away) if server not in self._ranks]
        abilities, failures = call_each(unknown, lambda server: server.abilities(self._timeout))
        if away or failures:
            raise AttemptFailedError(away | failures)
        self._ranks |= {server: found.ranks for server, found in abilities.items()}
        self._servers = list(servers)
        return bucket_bytes

    def merges(self, servers: Sequence[Endpoint], base: str) -> bool:
        """Return whether all servers merge LoRA over every transport, with this base."""
        return merge_without_streams(servers, base, self._timeout)

    def start(self, plans: Sequence[BucketPlan], lora_scale: float | None = None) -> None:
        """Make the buffers."""
        self._lora = "" if lora_scale is None else f"{LORA}{lora_scale!r}"
        nbytes = max(plan.nbytes for plan in plans)
        if not self._buffers or nbytes > self._nbytes:
            self._nbytes = nbytes
            self._buffers = [self._new_buffer() for _ in range(2)]

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """Return one of two, uint8 [≥ nbytes]; on CUDA a new one, while the old one lives until servers release it."""
        if portability.has_cuda():
            self._buffers[index % 2] = self._new_buffer()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        return self._buffers[index % 2]

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Send each server the bucket's address, and wait until all have copied it."""
        ready.synchronize()

        def copy(server: Endpoint) -> None:
            # A payload can be opened once: it counts the processes that hold the memory. So each rank gets its own.
            payloads = [base64.b64encode(packed_address(plan, flat)).decode() for _ in range(self._ranks[server])]
            load_format = "flattened_bucket" + self._lora
            body = {"serialized_named_tensors": payloads, "load_format": load_format, "flush_cache": False}
            server.post("/update_weights_from_tensor", body, self._timeout)

        _, failures = call_each(self._servers, copy)
        self._servers = without(self._servers, failures)
        return failures

    def finish(self) -> dict[Endpoint, ServerError]:
        """Do nothing: all buckets are copied."""
        return {}

    def abandon(self) -> None:
        """Drop the buffers, which a server that hangs may still map, and the servers' sizes, as some may be new."""
        self._buffers, self._ranks = [], {}

    def close(self) -> None:
        """Free the buffers here; servers of this project keep them mapped until a weight sync that uses others."""
        self._buffers = []

    def _new_buffer(self) -> Tensor:
        if portability.has_cuda():
            return torch.empty(self._nbytes, dtype=torch.uint8, device=portability.device())
        with _stderr_withheld():
            storage = torch.UntypedStorage._new_using_filename_cpu(self._nbytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage)


@contextlib.contextmanager
def _stderr_withheld() -> Iterator[None]:
    """Withhold this process's stderr from torch_shm_manager, which torch starts with the first named memory.

    It lives as long as a server maps any, and a pipe behind our stderr (2>&1 | tee) would not end before.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def packed_address(plan: BucketPlan, flat: Tensor) -> bytes:
    """Return a pickle of the bytes' address and each tensor's place among them, as SGLang's flattened_bucket has it."""
    metadata = [
        SimpleNamespace(
            name=spec.name,
            shape=torch.Size(spec.shape),
            dtype=spec.dtype,
            start_idx=start,
            end_idx=start + spec.nbytes,
            numel=spec.nbytes,
        )
        for spec, start in zip(plan.specs, plan.starts, strict=True)
    ]
    packed = io.BytesIO()
    _Pickler(packed, protocol=4).dump({"flattened_tensor": flat, "metadata": metadata})
    return packed.getvalue()


class _Pickler(pickle.Pickler):
    """Puts a tensor's address in the place of its bytes."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(value)  # type: ignore[no-untyped-call]
            # Numbers of devices differ between processes that see different ones; SGLang reads the device's own name.
            name = str(torch.cuda.get_device_properties(value.device).uuid)
            return rebuild, (*arguments[:_DEVICE], name, *arguments[_DEVICE + 1 :])
        return reductions.rebuild_tensor, (
            Tensor,
            _Storage(value),
            (value.storage_offset(), value.size(), value.stride(), False),
        )


class _Storage:
    """The named shared memory of a tensor, uint8; another process may map it once."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = _Memory(tensor)

    def __reduce__(self) -> Any:
        return reductions.rebuild_typed_storage, (self._memory, torch.uint8)


class _Memory:
    """The same without a dtype. torch recognises memory that is mapped already only in this form."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = tensor.untyped_storage()

    def __reduce__(self) -> Any:
        manager, handle, size = self._storage._share_filename_cpu_()
        self._storage._shared_incref()  # type: ignore[no-untyped-call]  # the receiver takes it off again
        return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size)
