"""Fill the environment it runs in: torch for the CPU or for CUDA, then the project with its tools.

``make setup`` calls it; versions are those of requirements.lock. PyPI's torch for Linux brings gigabytes of CUDA
libraries; the CPU build has a version of its own (``+cpu``), which PyTorch's own index and many mirrors offer.
With ``--device cuda`` (``make setup-cuda``) it is PyPI's torch, and transformer-engine is compiled against it.
This file needs the standard library alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda)-")
ADVICE = (
    "set PIP_INDEX_ARGS='--extra-index-url ADDRESS' to an index with CPU builds, or TORCH to the path or address of a "
    "CPU wheel (make setup TORCH=…)"
)
#: What transformer-engine's torch part is built with: as it compiles against torch, pip must not isolate the build.
BUILD_TOOLS = ("setuptools>=77.0.3,<85", "wheel", "packaging", "pybind11", "cmake", "ninja", "numpy")
EXTRAS = "dev,docs,gguf,lhotse,speech,wandb"
LOCK = Path("requirements.lock")


def main() -> None:
    """Install everything, or end with one line on what to set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what the environment is for")
    parser.add_argument(
        "--torch", default="", help="requirement, path or address to install as torch; default: the device's build"
    )
    parser.add_argument("--pip-args", default="", help="options for every pip install, in one text")
    given = parser.parse_args()
    options = shlex.split(given.pip_args)
    version = locked_version("torch")
    if not pip([*options, "--upgrade", "pip>=24.1"]):  # older ones download whole wheels to look at their metadata
        sys.exit("error: pip cannot reach a package index; see its message above, and PIP_INDEX_ARGS in the Makefile")
    if given.device == "cuda":
        toolkit = cuda_toolkit()
        install_cuda_torch(given.torch, version, options)
        install_transformer_engine(toolkit, options)
        install_project(f"{EXTRAS},gpu", options)
        return
    if not torch_is_there(version):
        install_torch(given.torch, version, options)
    install_project(EXTRAS, options)
    pulled = sorted(
        {
            name
            for dist in importlib.metadata.distributions()
            if CUDA_PACKAGE.match(name := (dist.metadata["Name"] or "").lower())
        }
    )
    if pulled:
        sys.exit(f"error: CUDA packages were installed: {', '.join(pulled)}; run make clean and {ADVICE}")


def install_project(extras: str, options: list[str]) -> None:
    """Install the project in place, in the versions of the lock."""
    print("installing the project …", flush=True)
    if not pip([*options, "-c", str(LOCK), "-e", f".[{extras}]"]):
        sys.exit("error: installing the project failed; pip's own message is above")


def cuda_toolkit() -> Path:
    """Return the folder of the CUDA toolkit: CUDA_HOME, that of nvcc in PATH, or /usr/local/cuda."""
    compiler = shutil.which("nvcc")
    known = [os.environ.get("CUDA_HOME"), compiler and str(Path(compiler).resolve().parents[1]), "/usr/local/cuda"]
    for folder in filter(None, known):
        if (Path(folder) / "bin" / "nvcc").exists():
            return Path(folder)
    sys.exit(
        "error: no CUDA toolkit (nvcc), against which transformer-engine compiles: set CUDA_HOME to its folder, build "
        "the Dockerfile, or run make setup for the CPU"
    )


def install_cuda_torch(wanted: str, version: str, options: list[str]) -> None:
    """Install ``wanted``, else the build of ``version`` without a suffix, unless a CUDA build of it is there."""
    if not (torch_is_there(version) and torch_has_cuda()):
        # Three equals signs compare text: two would take a mirror's 2.13.0+cpu for a later 2.13.0.
        requirement = wanted or f"torch==={version}"
        print(f"installing {requirement} with its CUDA libraries; gigabytes …", flush=True)
        if not pip([*options, requirement]):
            sys.exit(f"error: pip cannot install {requirement}; set TORCH to the path or address of a CUDA wheel")
    if not torch_has_cuda():
        sys.exit("error: the installed torch is a build without CUDA; set TORCH to the path or address of a CUDA wheel")


def torch_has_cuda() -> bool:
    """Return whether the installed torch imports and was built for CUDA; a GPU is not needed."""
    probe = "import sys, torch; sys.exit(torch.version.cuda is None)"
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def install_transformer_engine(toolkit: Path, options: list[str]) -> None:
    """Compile transformer-engine's torch part against the installed torch."""
    print("installing transformer-engine; its torch part compiles, many minutes …", flush=True)
    constrained = [*options, "-c", str(LOCK)]
    os.environ |= {"CUDA_HOME": str(toolkit), "NVTE_FRAMEWORK": "pytorch"}
    if not (
        pip([*constrained, *BUILD_TOOLS]) and pip([*constrained, "--no-build-isolation", *extra_requirements("gpu")])
    ):
        sys.exit("error: installing transformer-engine failed; pip's own message is above")


def locked_version(name: str) -> str:
    """Return the version of a package in requirements.lock."""
    match = re.search(rf"^{re.escape(name)}==([0-9.]+)(?:;.*)?$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit(f"error: {LOCK} has no {name}; make it again with make lock")
    return match[1]


def extra_requirements(extra: str) -> list[str]:
    """Return the requirements of one extra in pyproject.toml."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements: list[str] = project["optional-dependencies"][extra]
    return requirements


def torch_is_there(version: str) -> bool:
    """Return whether a torch of this version is installed already, of any build."""
    try:
        return importlib.metadata.version("torch").partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def install_torch(wanted: str, version: str, options: list[str]) -> None:
    """Install ``wanted``, else the CPU build of ``version``, else what pip offers for it if that is free of CUDA."""
    if wanted:
        if not pip([*options, wanted]):
            sys.exit(f"error: pip cannot install {wanted}, which TORCH names")
        return
    print(f"installing the CPU build of torch {version} …", flush=True)
    # The index is tried first, because pip tries an unreachable one again and again.
    index = ["--extra-index-url", CPU_INDEX] if sys.platform == "linux" and reachable(CPU_INDEX) else []
    if sys.platform == "linux" and pip([*options, *index, f"torch=={version}+cpu"]):
        return
    print("no build named so; looking at what pip offers under that version …", flush=True)
    plain = f"torch=={version}"
    pulled = [name for name in would_install(plain, options) if CUDA_PACKAGE.match(name)]
    if pulled:
        sys.exit(f"error: pip finds no CPU build of {plain}, only one that pulls CUDA ({pulled[0]}, …); {ADVICE}")
    if not pip([*options, plain]):
        sys.exit(f"error: pip cannot install {plain}; {ADVICE}")


def reachable(address: str) -> bool:
    """Return whether the host answers within three seconds."""
    try:
        with urllib.request.urlopen(f"{address}/torch/", timeout=3):
            return True
    except OSError:
        return False


def would_install(requirement: str, options: list[str]) -> list[str]:
    """Return the names of the packages that pip would install for a requirement; [] when it finds none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if not pip([*options, "--dry-run", "--report", str(report), requirement]):
            return []
        return [item["metadata"]["name"].lower() for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def pip(arguments: list[str]) -> bool:
    """Run ``pip install``, which prints errors alone; return whether it succeeded."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    main()
