"""GPUs as published: memory, bandwidth, dense bf16 peak (without sparsity), and what links those of a machine."""

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
        link: NVLink's, bytes a second in each direction.
        network: a GPU's share of its machine's, bytes a second in each direction.
        host: of PCIe to the host, bytes a second in each direction.
    """

    name: str
    memory: float
    bandwidth: float
    peak: float
    link: float
    network: float
    host: float


#: GPUs of a machine that NVLink joins
NODE = 8

#: by the name that the tools take; SXM versions, from NVIDIA's data sheets of the GPU and of its DGX machine
GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 2.039e12, 312e12, 300e9, 25e9, 32e9),
    "h100": Gpu("H100 80 GB", 80e9, 3.35e12, 989e12, 450e9, 50e9, 64e9),
    "h200": Gpu("H200 141 GB", 141e9, 4.8e12, 989e12, 450e9, 50e9, 64e9),
    "b200": Gpu("B200 180 GB", 180e9, 8.0e12, 2250e12, 900e9, 50e9, 64e9),
}


#: Parts of the CUDA names of cards that are slower than the SXM version of the same GPU.
_SLOWER = ("h100 pcie", "nvl")


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by its CUDA name; None if it is not known, as of cards with less power."""
    name = device_name.lower()
    matches = [gpu.peak for key, gpu in GPUS.items() if key in name and not any(card in name for card in _SLOWER)]
    return matches[0] if matches else None
