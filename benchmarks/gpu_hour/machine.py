"""``python -m benchmarks.gpu_hour.machine FILE``: write what the machine is, and print what the script's parts may use.

Printed are the words cuda and te (transformer-engine) where they are there.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.figures import processor
from megatron_cord.runtime.files import write_json

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "liger-kernel")


def versions() -> dict[str, str]:
    """Return the version of each package that the figures depend on."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Write the file and print the words."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_properties(0) if cuda else None
    write_json(
        Path(sys.argv[1]),
        {
            "device": processor() if device is None else device.name,
            "device_memory_gb": None if device is None else round(device.total_memory / 1e9, 1),
            "versions": versions(),
        },
    )
    print(*["cuda"] * cuda, *["te"] * (find_spec("transformer_engine") is not None))


if __name__ == "__main__":
    main()
