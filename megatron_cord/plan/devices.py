"""GPUs as published: memory, bandwidth, and dense bf16 peak (without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as sold.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        peak: dense bf16 floating-point operations a second.
    """

    name: str
    memory: float
    bandwidth: float
    peak: float


#: by the name that the tools take; SXM versions
GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 2.039e12, 312e12),
    "h100": Gpu("H100 80 GB", 80e9, 3.35e12, 989e12),
    "h200": Gpu("H200 141 GB", 141e9, 4.8e12, 989e12),
    "b200": Gpu("B200 180 GB", 180e9, 8.0e12, 2250e12),
}


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by its CUDA name; None if it is not known."""
    matches = [gpu.peak for key, gpu in GPUS.items() if key in device_name.lower()]
    return matches[0] if matches else None
