"""Fill the environment it runs in with the SGLang server: ``make sglang-env`` runs it in ``.venv-sglang``.

On a CUDA machine pip resolves everything (``--device cuda``). SGLang publishes no build for plain CPUs, but its Python
code runs there: this installs it without the packages that need CUDA, and the server is started with stand-ins for the
compiled kernels. It serves tests; it is slow.
Versions shared with the trainer's environment are those of requirements.lock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
from pathlib import Path

from tools.install import extra_requirements, install_cuda_torch, install_torch, locked_version, pip, torch_is_there

#: Installed without their own requirements, which need CUDA.
_ALONE = [
    "torchvision==0.28.0", "torchaudio==2.11.0", "triton==3.7.1", "compressed-tensors", "blobfile", "xgrammar==0.2.7",
    "apache-tvm-ffi==0.1.11", "modelscope", "datasets", "timm",
]  # fmt: skip
_SERVER = [
    "mistral_common", "aiohttp", "orjson", "requests", "fastapi", "uvicorn", "uvloop", "pyzmq", "msgspec", "psutil",
    "setproctitle", "numpy", "pydantic", "python-multipart", "prometheus-client", "partial_json_parser", "pillow",
    "pybase64", "regex", "scipy", "sentencepiece", "tiktoken", "tqdm", "xxhash", "zstandard", "einops", "interegular",
    "distro", "packaging", "openai==2.6.1", "openai-harmony==0.0.4", "ninja", "soundfile", "IPython", "watchfiles",
    "easydict", "gguf", "llguidance", "nvidia-ml-py", "dill", "loguru", "jsonschema", "httpx", "anthropic",
]  # fmt: skip


def main() -> None:
    """Install everything, or end with one line on what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--torch", default="", help="requirement, path or address to install as torch; default: the device's build"
    )
    parser.add_argument("--pip-args", default="", help="options for every pip install, in one text")
    given = parser.parse_args()
    options = shlex.split(given.pip_args)
    torch = locked_version("torch")
    (sglang,) = extra_requirements("sglang")
    if given.device == "cuda":
        install_cuda_torch(given.torch, torch, options)
        # The cuda-tile that SGLang pins is a stub: it downloads the wheel from NVIDIA's own index as pip builds it.
        finish(pip([*options, sglang]), f"{sglang} (its cuda-tile downloads from NVIDIA's index while it installs)")
        return
    transformers = f"transformers=={locked_version('transformers')}"
    if not torch_is_there(torch):
        install_torch(given.torch, torch, options)
    print(f"installing {sglang} for CPU; some minutes, 3 GB …", flush=True)
    finish(pip([*options, "--no-deps", sglang, *_ALONE]), sglang)
    finish(pip([*options, f"torch=={torch}", transformers, *_SERVER]), "the server's requirements")
    for library in importlib.metadata.distribution("torchaudio").files or []:
        if (
            library.suffix == ".so"
        ):  # built for CUDA, so they do not load; the part in Python is all that the server needs
            Path(str(library.locate())).unlink(missing_ok=True)


def finish(installed: bool, what: str) -> None:
    """End the program if pip failed."""
    if not installed:
        sys.exit(f"error: installing {what} failed; pip's own message is above")


if __name__ == "__main__":
    main()
