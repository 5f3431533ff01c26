"""Where a tensor is pretended to lie: on the host or on "cuda:0".

All tensors are ordinary CPU tensors. The mark is an attribute of their storage, which torch keeps as long as the memory
lives, so views share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.pretend_gpu.streams import Moment


def tensors_of(*values: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> Any:
    """Return the storage that holds the marks; None for tensors without one (meta, fake, sparse)."""
    try:
        return tensor.untyped_storage() if tensor.device.type == "cpu" else None
    except (NotImplementedError, RuntimeError):
        return None


def lies_on_device(tensor: Tensor) -> bool:
    """Return whether the tensor is pretended to lie on the device."""
    return bool(getattr(storage_of(tensor), "on_device", False))


def place(value: Any, *, on_device: bool) -> None:
    """Mark the memory of all tensors in a value."""
    for tensor in tensors_of(value):
        storage = storage_of(tensor)
        if storage is not None:
            storage.on_device = on_device


def pin(tensor: Tensor) -> None:
    """Mark host memory as pinned."""
    storage = storage_of(tensor)
    if storage is not None:
        storage.pinned = True


def is_pinned(tensor: Tensor) -> bool:
    """Return whether the tensor lies in pinned host memory."""
    return bool(getattr(storage_of(tensor), "pinned", False))


def note_use(tensor: Tensor, moment: Moment, *, writes: bool) -> None:
    """Remember that queued work reads or writes the tensor's memory, on the device or, by a copy, on the host."""
    storage = storage_of(tensor)
    if storage is None:
        return
    if writes:
        storage.written, storage.read = moment, {}
    else:
        storage.read = getattr(storage, "read", {}) | {moment.stream: moment}


def earlier_uses(tensor: Tensor, *, writes: bool) -> list[Moment]:
    """Return the queued work that a new use of the memory must come after: the last write, and reads before a write."""
    storage = storage_of(tensor)
    written = getattr(storage, "written", None)
    reads = list(getattr(storage, "read", {}).values()) if writes else []
    return reads if written is None else [written, *reads]


def named_device(value: Any) -> bool | None:
    """Return True, False or None: a device argument names the GPU, the host, or neither."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return True
    try:
        return {"cuda": True, "cpu": False}.get(torch.device(value).type)
    except (RuntimeError, TypeError):
        return None


def hosts_of(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors in host memory that CUDA would refuse beside device tensors: all but scalars."""
    return (tensor for tensor in tensors if tensor.dim() > 0 and not lies_on_device(tensor))
