"""How much memory this process has used at most, on its device and on the host."""

from __future__ import annotations

import resource

import torch

_GB = 1e9  #: of all figures, as GPUs are sold and as `cord plan` prints


def reset_peak() -> None:
    """Let the device's peaks begin anew from what is held now."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Return peaks in GB (1e9 bytes).

    `memory_host_gb` is of the process since its start. On CUDA there are two more, since `reset_peak`:
    `memory_peak_gb` of tensors, and `memory_reserved_gb` of what torch took from the device for them.
    """
    peaks = {"memory_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GB}  # Linux: KiB
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peaks["memory_peak_gb"] = torch.cuda.max_memory_allocated() / _GB
        peaks["memory_reserved_gb"] = torch.cuda.max_memory_reserved() / _GB
    return peaks
