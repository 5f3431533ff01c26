"""Copies between host and device that do not make the host wait.

A blocking copy waits for all that was queued on the device before it; so does one that is called non-blocking, but
reads or writes pageable memory. Without CUDA host and device are one, and nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; from the host the copy is queued, by way of pinned memory.

    The host may change its tensor at once: what is copied later is the pinned copy, whose memory torch keeps until
    then.
    """
    if tensor.device == device or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Queue a copy to pinned host memory, which may be read once the device has done it.

    A copy back on the same stream is ordered after it.
    """
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
