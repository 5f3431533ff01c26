"""Survey this machine: each part that the project can use, its version and state, and what is missed without it.

Packages are found by their metadata and, where a broken installation is common, imported in a process of their own: a
half-installed transformer-engine or a CUDA build without its libraries must not end the report. It simplifies: a part
that imports counts as working.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

GIB = 1024**3
PROBE_SECONDS = 120  # importing a large package from a cold disk can take most of a minute
INSTALL = "pip install -e ."

State = Literal["in use", "available", "missing", "broken"]


@dataclass(frozen=True)
class Part:
    """One line of the report."""

    name: str
    version: str  #: "" when the part is missing
    state: State
    note: str  #: what it is used for, or what is missed without it and where it comes from
    required: bool = False

    @property
    def fails(self) -> bool:
        """Whether the project cannot run because of this part."""
        return self.required and self.state in ("missing", "broken")


@dataclass(frozen=True)
class Package:
    """How to find a package, and its texts in the report."""

    name: str
    distributions: tuple[str, ...]  #: the first that is installed counts
    probe: str  #: a statement that fails if the package does not work; "": only the metadata are checked
    purpose: str
    missed: str
    #: when it is in use: always, where there is a CUDA device, or where the configuration chooses it
    use: Literal["always", "cuda", "chosen"] = "always"
    required: bool = False


PACKAGES = (
    Package("torch", ("torch",), "import torch", "tensors, gloo and NCCL", "nothing runs", required=True),
    Package(
        "Megatron-Core",
        ("megatron-core",),
        "import megatron.core",
        "model, parallelism, checkpoints",
        "nothing trains",
        required=True,
    ),
    Package(
        "transformers",
        ("transformers",),
        "import transformers",
        "local rollouts, tokenizers",
        "no local rollouts",
        required=True,
    ),
    Package("safetensors", ("safetensors",), "", "weights in files", "no checkpoints to start from", required=True),
    Package("numpy", ("numpy",), "", "audio", "no audio", required=True),
    Package("webdataset", ("webdataset",), "", "shards of samples", "no training data", required=True),
    Package("math-verify", ("math-verify",), "", "comparing answers", "no reward", required=True),
    Package(
        "pyarrow",
        ("pyarrow",),
        "import pyarrow.parquet",
        "the rollout dump",
        "no rollout dump",
        required=True,
    ),
    Package("TensorBoard", ("tensorboard",), "", "curves while training", "no curves while training", required=True),
    Package(
        "transformer-engine",
        ("transformer-engine",),
        "import transformer_engine.pytorch",
        "Megatron's fused optimizer; fused layers and FP8",
        "torch's layers and Adam instead of fused ones, no FP8; extra gpu, CUDA only",
        use="cuda",
    ),
    Package(
        "apex (NVIDIA)",
        ("apex",),
        "from apex.optimizers import FusedAdam",
        "fused Adam where transformer-engine is missing",
        "torch's Adam where transformer-engine is missing too; from NVIDIA's source, CUDA only (not the apex on PyPI)",
        use="chosen",
    ),
    Package(
        "Weights & Biases",
        ("wandb",),
        "",
        "metrics there as well",
        "metrics in files and TensorBoard alone; extra wandb",
        use="chosen",
    ),
    Package(
        "Triton",
        ("triton",),
        "import triton",
        "compiled GPU kernels",
        "plain torch kernels; comes with CUDA torch",
        use="chosen",
    ),
    Package(
        "DALI",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "import nvidia.dali",
        "audio features on the GPU",
        "audio features with torch; extra dali",
        use="chosen",
    ),
    Package(
        "espeak-ng",
        ("espeakng-loader",),
        "import espeakng_loader; espeakng_loader.load_library()",
        "speaking questions",
        "no questions can be spoken, the quickstart's neither; extra speech",
    ),
)


def survey(root: Path) -> list[Part]:
    """Return every part as it is now; ``root`` is the project's folder, where ``.venv-sglang`` may be.

    Imports run in processes of their own, a few seconds each for the large packages. A broken part raises nothing.
    """
    gpus = _gpus()
    parts = [Part("Python", platform.python_version(), "in use", sys.executable, required=True)]
    parts += [examine(package, cuda=bool(gpus)) for package in PACKAGES]
    parts.append(_fused_kernels(cuda=bool(gpus)))
    parts.append(_sglang(root / ".venv-sglang" / "bin" / "python"))
    return parts + _devices(gpus)


def examine(package: Package, *, cuda: bool) -> Part:
    """Return the line of one package; ``cuda``: whether there is a CUDA device to use it with."""
    version = next(filter(None, map(_version, package.distributions)), "")
    if not version:
        return Part(package.name, "", "missing", package.missed, package.required)
    failure, _ = _run(sys.executable, package.probe) if package.probe else ("", "")
    if failure:
        return Part(package.name, version, "broken", f"{failure}; without it: {package.missed}", package.required)
    used = package.use == "always" or (package.use == "cuda" and cuda)
    return Part(package.name, version, "in use" if used else "available", package.purpose, package.required)


def _fused_kernels(*, cuda: bool) -> Part:
    """Return the line of what training with ``model.layers=auto`` fuses."""
    if not cuda:
        return Part("fused kernels", "", "missing", "none of the layers' are used without a GPU")
    failure, fused = _run(
        sys.executable,
        "from megatron_cord.model.config import LayerConfig\n"
        "from megatron_cord.model.layers.transformer import choose_fusions\n"
        "print(choose_fusions(LayerConfig()))",
    )
    if failure:
        return Part("fused kernels", "", "broken", failure)
    return Part("fused kernels", "", "in use", f"in the layers: {fused.strip().splitlines()[-1]}")


def _version(distribution: str) -> str:
    try:
        # A directory of metadata without its file, as an interrupted installation leaves it, has no version.
        return importlib.metadata.version(distribution) or "unknown"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def _run(python: str | Path, statement: str) -> tuple[str, str]:
    """Run the statement in a new interpreter; return what went wrong in one line ("" for nothing), and its output."""
    command = [str(python), "-W", "ignore", "-c", statement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"importing it took more than {PROBE_SECONDS} s", ""
    except OSError as error:
        return f"cannot start {python}: {error.strerror}", ""
    if done.returncode == 0:
        return "", done.stdout
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"importing it ended with status {done.returncode}")[:160], ""


def _gpus() -> list[tuple[str, int]]:
    """Return name and bytes of memory of each CUDA device; none with a broken torch."""
    _, printed = _run(
        sys.executable,
        "import torch\n"
        "for index in range(torch.cuda.device_count()):\n"
        "    device = torch.cuda.get_device_properties(index)\n"
        "    print(device.total_memory, device.name, sep='\\t')",
    )
    rows = [line.split("\t", 1) for line in printed.splitlines() if "\t" in line]
    return [(name, int(memory)) for memory, name in rows]


def _sglang(python: Path) -> Part:
    purpose, missed = (
        "rollout server",
        "rollouts by the local engine alone; extra sglang, in an environment .venv-sglang",
    )
    if version := _version("sglang"):
        return Part("SGLang", version, "available", f"{purpose}, in this environment")
    if not python.exists():
        return Part("SGLang", "", "missing", missed)
    failure, version = _run(python, "import importlib.metadata as metadata; print(metadata.version('sglang'))")
    if failure:
        return Part("SGLang", "", "broken", f".venv-sglang: {failure}; without it: {missed}")
    return Part("SGLang", version.strip(), "available", f"{purpose}, in .venv-sglang")


def _devices(gpus: list[tuple[str, int]]) -> list[Part]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    parts = [
        Part("CPU cores", str(cores), "available" if gpus else "in use", platform.machine()),
        Part("memory", f"{memory.total / GIB:.1f} GiB", "in use", f"{memory.available / GIB:.1f} GiB free"),
    ]
    if not gpus:
        parts.append(Part("GPUs", "", "missing", "training and rollouts on the CPU, for small models only"))
    return parts + [
        Part(f"GPU {index}", f"{size / GIB:.1f} GiB", "in use", name) for index, (name, size) in enumerate(gpus)
    ]
