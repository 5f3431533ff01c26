"""How a server of this project takes weights where SGLang's own receiver is slow.

``serve.py`` installs it in the processes that hold the model.

A stream. SGLang 0.5.21 takes a request for each bucket of a broadcast, and for each it concatenates tensors that hold
nothing into a second buffer before it receives. Here one request announces all tensors, the buckets follow one another,
and each is loaded as soon as it is there, from memory that is used again. ``/server_info`` tells trainers that a server
can do this; others are sent one bucket a request.

Shared memory. SGLang maps a buffer for each bucket and unmaps it, though a trainer has but two of them. Here they stay
mapped until a session that uses others, or the server's end.

LoRA. Adapters alone are merged with the server's own checkpoint while they are loaded, from a stream, a bucket in
shared memory, or files (``lora_merge.py``).

A group that is left on a GPU is aborted, so that a server survives a trainer, or another server, that is gone in the
middle of a broadcast.

It runs in the server's interpreter and must not import the project; the trainer takes the two names from here.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What the load_format of a stream begins with; the number of tensors in each bucket follows, joined by commas.
STREAMED = "streamed:"
ABILITY = "cord_streamed_weights"  #: in /server_info: true where streams are taken


class Spec(NamedTuple):
    """Name, dtype and shape of a tensor that is not there yet."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Stream:
    """The tensors of all buckets, by name. While a bucket's tensors are loaded, the next one comes in.

    Args:
        specs: of all tensors, in the order of their bytes.
        counts: how many of them are in each bucket.
        receive: starts to fill uint8 [bytes of a bucket] with the next one; what it returns can be waited for.
        buffers: where they come in.
    """

    def __init__(
        self, specs: Sequence[Spec], counts: Sequence[int], receive: Callable[[Tensor], Any], buffers: Buffers
    ) -> None:
        if sum(counts) != len(specs):
            raise ValueError(f"{len(specs)} tensors were announced, and buckets of {sum(counts)}")
        remaining = iter(specs)
        self._buckets = [list(islice(remaining, count)) for count in counts]
        self._receive, self._buffers = receive, buffers
        self._read = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self._read:
            raise RuntimeError(
                "streamed weights can be loaded only once, and this server has a second model, for drafts; "
                "start it without"
            )
        self._read = True
        coming: deque[tuple[list[Spec], Tensor, Any]] = deque()
        for bucket in self._buckets:
            flat = self._buffers.take(sum(spec.nbytes for spec in bucket))
            coming.append((bucket, flat, self._receive(flat)))
            del flat  # or it would count as used
            if len(coming) > 1:
                yield from _arrived(*coming.popleft())
        yield from _arrived(*coming.popleft())


def _arrived(bucket: list[Spec], flat: Tensor, arrival: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one bucket."""
    arrival.wait()
    start = 0
    for spec in bucket:
        yield spec.name, flat[start : start + spec.nbytes].view(spec.dtype).view(list(spec.shape))
        start += spec.nbytes


class Buffers:
    """Memory for one bucket after the other, used again once no tensor of an earlier bucket is left.

    On a GPU torch does just that; on a CPU new memory costs as much as a bucket's transfer. Here as there it is kept
    for the next weight sync.

    Args:
        device: of the memory.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: list[tuple[Any, weakref.ref[Any]]] = []  # numpy arrays, and the part that the last tensors lie in

    def take(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes]."""
        if self._device != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        import numpy as np

        free = [place for place, (_, part) in enumerate(self._pool) if part() is None]
        place = next((place for place in free if self._pool[place][0].size >= nbytes), None)
        if place is None:
            for too_small in reversed(free):
                del self._pool[too_small]
            place = len(self._pool)
        array = self._pool.pop(place)[0] if place < len(self._pool) else np.empty(nbytes, np.uint8)
        part = array[:nbytes]
        self._pool.append((array, weakref.ref(part)))
        return torch.from_numpy(part)


def install() -> None:
    """Replace SGLang's receivers, in a process that has not made its model yet."""
    import lora_merge
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.model_loader.loader import DefaultModelLoader

    receive_each, load = WeightUpdater.receive_weights_from_distributed, WeightUpdater.update_weights_from_tensor
    end_session, destroy = WeightUpdater.end_weight_update, WeightUpdater.destroy_weights_update_group
    init_info, read_files = Scheduler.get_init_info, DefaultModelLoader._get_weights_iterator
    # By address; torch finds a buffer that is mapped already, as long as one tensor is left in it.
    mapped: dict[int, Tensor] = {}
    used: set[int] = set()  # in this session
    buffers: dict[str, Buffers] = {}  # by device
    base: dict[str, Any] = {}  # of the checkpoint that the server was started with

    def receive(
        self: Any,
        *,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        load_format: str | None = None,
    ) -> Any:
        if load_format is None or not load_format.startswith(STREAMED):
            return receive_each(
                self, names=names, dtypes=dtypes, shapes=shapes, group_name=group_name, load_format=load_format
            )
        group = self._model_update_group[group_name]
        sizes, _, scale = load_format.removeprefix(STREAMED).partition(lora_merge.LORA)
        counts = [int(count) for count in sizes.split(",")]
        specs = [
            Spec(name, getattr(torch, dtype), shape) for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
        ]
        stream = Stream(
            specs,
            counts,
            lambda flat: torch.distributed.broadcast(flat, 0, group=group, async_op=True),
            buffers.setdefault(self.device, Buffers(self.device)),
        )
        return lora_merge.merged(stream, float(scale), base["checkpoint"]) if scale else stream

    def keep_and_load(self: Any, named_tensors: Any, load_format: str | None = None) -> Any:
        kind, _, scale = (load_format or "").partition(lora_merge.LORA)
        if kind == "flattened_bucket" and (flat := named_tensors["flattened_tensor"]).device.type == "cpu":
            mapped[flat.data_ptr()] = flat
            used.add(flat.data_ptr())
        if not scale:
            return load(self, named_tensors, load_format)
        # Tensor by tensor: merged, a bucket of adapters is as large as the model.
        tensors = lora_merge.merged(lora_merge.unpacked(named_tensors), float(scale), base["checkpoint"])
        return self.load_weights_from_distributed(tensors)

    def read_and_merge(self: Any, source: Any, **settings: Any) -> Any:
        tensors, scale = read_files(self, source, **settings), lora_merge.scale_of(Path(source.model_or_path))
        return tensors if scale is None else lora_merge.merged(tensors, scale, base["checkpoint"])

    def release_and_end(self: Any, **settings: Any) -> None:
        for address in mapped.keys() - used:
            del mapped[address]
        used.clear()
        end_session(self, **settings)

    def init_info_with_ability(self: Any) -> dict[str, Any]:
        # In each process that holds the model, before its first weight sync.
        checkpoint = Path(self.server_args.model_path)
        known = lora_merge.identity(checkpoint)
        if known is not None:
            base["checkpoint"] = lora_merge.Base(checkpoint)
        abilities = {ABILITY: self.draft_worker is None, lora_merge.BASE: known, lora_merge.ANY_TRANSPORT: True}
        return init_info(self) | abilities  # type: ignore[no-any-return]

    def leave(self: Any, group_name: str) -> tuple[bool, str]:
        # NCCL's plain end waits for what is in flight, and a broadcast whose sender is gone never ends.
        group = self._model_update_group.get(group_name)
        if group is None or torch.distributed.get_backend(group) != "nccl":
            return destroy(self, group_name)  # type: ignore[no-any-return]
        torch.distributed.distributed_c10d._abort_process_group(self._model_update_group.pop(group_name))
        return True, "left"

    WeightUpdater.receive_weights_from_distributed = receive
    WeightUpdater.destroy_weights_update_group = leave
    WeightUpdater.update_weights_from_tensor = keep_and_load
    WeightUpdater.end_weight_update = release_and_end
    DefaultModelLoader._get_weights_iterator = read_and_merge
    Scheduler.get_init_info = init_info_with_ability
