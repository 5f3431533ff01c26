"""Where a tensor is pretended to lie: on the host or on "cuda:0".

All tensors are ordinary CPU tensors. The mark is an attribute of their storage, which torch keeps as long as the memory
lives, so views share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Transfer:
    """A copy between pinned memory and the device that was queued and not waited for."""

    host: Literal["written", "read"]  #: what it does to the host's memory
    done: bool = False  #: the host has waited for it


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


def note_transfer(host: Tensor, transfer: Transfer) -> None:
    """Remember a copy that reads or writes host memory later."""
    storage = storage_of(host)
    storage.transfers = [*transfers_of(host), transfer]


def transfers_of(host: Tensor) -> list[Transfer]:
    """Return the copies that still read or write this memory."""
    return [transfer for transfer in getattr(storage_of(host), "transfers", ()) if not transfer.done]


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
