"""Ask pip whether versions can be found for both CUDA environments: ``make dry-run-cuda``, weekly in CI.

Nothing is installed and no GPU is needed: pip resolves from the index's metadata (``--dry-run``). It shows that the
pins agree, torch's own Triton with the lock's among them; whether the packages build and run on a GPU it cannot show.

Simplifications: the requirements of the two packages without a wheel stand below, as pip would have to build them to
ask; pip resolves for the Python and the platform that it runs on; this file needs the standard library alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from tools.install import EXTRAS, LOCK, extra_requirements, locked_version

#: Packages without a wheel: (name, version) → requirements, as in their source distributions. The first compiles
#: against torch; the second is a stub, which downloads the wheel from NVIDIA's own index while pip builds it.
NO_WHEEL = {
    ("transformer_engine_torch", "2.11.0"): ["torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic"],
    ("transformer_engine_torch", "2.20.2"): [
        "torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect",
        "nvidia-cudnn-frontend>=1.29.0", "transformer_engine_cu13==2.20.2",
    ],
    ("cuda_tile", "1.6.0rc5"): [],
}  # fmt: skip


def main() -> None:
    """Resolve both environments; end with status 1 if pip refuses one, or finds other packages than CUDA's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip-args", default="", help="options for pip, in one text")
    options = shlex.split(parser.parse_args().pip_args)
    pip_version = importlib.metadata.version("pip")
    if tuple(map(int, pip_version.split(".")[:2])) < (24, 1):
        sys.exit(f"error: pip {pip_version} downloads whole wheels to read their metadata; upgrade it to 24.1 or later")
    failed = False
    for name, (requirements, constraints) in environments().items():
        print(f"{name}: {len(requirements)} requirements …", flush=True)
        found = resolve(requirements, [*options, *constraints])
        wrong = "pip's message is above" if found is None else objection(found)
        failed |= bool(wrong)
        print(f"{name}: " + (f"error: {wrong}" if wrong or found is None else summary(found)), flush=True)
    sys.exit(int(failed))


def environments() -> dict[str, tuple[list[str], list[str]]]:
    """Return for each environment what `make setup-cuda` asks pip for: requirements, and options with constraints."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = f"torch==={locked_version('torch')}"  # as text: a mirror's +cpu build does not count
    extras = [text for extra in [*EXTRAS.split(","), "gpu"] for text in extra_requirements(extra)]
    return {
        ".venv": ([torch, *project["dependencies"], *extras], ["-c", str(LOCK)]),
        ".venv-sglang": ([torch, *extra_requirements("sglang")], []),
    }


def resolve(requirements: list[str], options: list[str]) -> dict[str, str] | None:
    """Return the version of every package that pip would install into an empty environment; None if it refuses."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for (name, version), required in NO_WHEEL.items():
            write_metadata(folder, name, version, required)
        report = folder / "report.json"
        command = [
            *(sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"),
            *("--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", str(report)),
            *("--find-links", str(folder), *options, *requirements),
        ]
        if subprocess.run(command, check=False).returncode:
            return None
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {item["name"].lower().replace("_", "-"): item["version"] for item in found}


def write_metadata(folder: Path, name: str, version: str, required: list[str]) -> None:
    """Write a wheel that holds a package's metadata and nothing else."""
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in required)]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def objection(found: dict[str, str]) -> str:
    """Return what is wrong with versions that agree: a torch without CUDA, or another Triton than the lock's."""
    if not any(name.startswith("nvidia-") for name in found):
        return f"torch {found['torch']} brings no CUDA libraries"
    locked = locked_version("triton")
    if found.get("triton") != locked:
        return f"torch {found['torch']} runs Triton {found.get('triton')}, but {LOCK} names {locked} for the tests"
    return ""


def summary(found: dict[str, str]) -> str:
    """Return the number of packages, and the versions that others follow."""
    telling = ("torch", "triton", "cuda-toolkit", "transformer-engine", "megatron-core", "sglang", "transformers")
    return f"{len(found)} packages; " + ", ".join(f"{name} {found[name]}" for name in telling if name in found)


if __name__ == "__main__":
    main()
