"""Fills the environment it runs in with the SGLang server: ``make sglang-env`` runs it in ``.venv-sglang``.

On a CUDA machine that is pip's own affair (``--device cuda``). SGLang publishes no build for plain CPUs, but its Python code runs there: this
installs it without the packages that want CUDA, and the server is started with stand-ins for the compiled kernels. Good for tests, not for speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

from tools.install import install_torch, pinned_torch, pip, torch_is_there

#: Not looked into for what else they want, as that is CUDA.
_ALONE = ["torchvision==0.28.0", "torchaudio==2.11.0", "triton==3.7.1", "compressed-tensors", "blobfile", "xgrammar==0.2.7",
          "apache-tvm-ffi==0.1.11", "modelscope", "datasets", "timm"]  # fmt: skip
_SERVER = [
    "transformers==5.12.1", "mistral_common", "aiohttp", "orjson", "requests", "fastapi", "uvicorn", "uvloop", "pyzmq", "msgspec", "psutil",
    "setproctitle", "numpy", "pydantic", "python-multipart", "prometheus-client", "partial_json_parser", "pillow", "pybase64", "regex", "scipy",
    "sentencepiece", "tiktoken", "tqdm", "xxhash", "zstandard", "einops", "interegular", "distro", "packaging", "openai==2.6.1",
    "openai-harmony==0.0.4", "ninja", "soundfile", "IPython", "watchfiles", "easydict", "gguf", "llguidance", "nvidia-ml-py", "dill", "loguru",
    "jsonschema", "httpx", "anthropic",
]  # fmt: skip


def main() -> None:
    """Installs everything, or ends with one line on what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--torch", default="", help="requirement, path or address to install as torch; default: the CPU build (cpu)"
    )
    parser.add_argument("--pip-args", default="", help="options for every pip install, in one text")
    given = parser.parse_args()
    options = shlex.split(given.pip_args)
    setup = Path("setup.py").read_text(encoding="utf-8")
    sglang = pinned_sglang(setup)
    if given.device == "cuda":
        finish(pip([*options, sglang]), sglang)
        return
    torch = pinned_torch(setup)
    if not torch_is_there(torch):
        install_torch(given.torch, torch, options)
    print(f"installing {sglang} for CPU; some minutes, 3 GB …", flush=True)
    finish(pip([*options, "--no-deps", sglang, *_ALONE]), sglang)
    finish(pip([*options, f"torch=={torch}", *_SERVER]), "the server's requirements")
    for library in importlib.metadata.distribution("torchaudio").files or []:
        if (
            library.suffix == ".so"
        ):  # built for CUDA, so they do not load; the part in Python is all that the server needs
            Path(str(library.locate())).unlink(missing_ok=True)


def pinned_sglang(setup: str) -> str:
    """The requirement that setup.py pins."""
    match = re.search(r'"(sglang==[0-9.]+)"', setup)
    if match is None:
        sys.exit("error: setup.py pins no sglang")
    return match[1]


def finish(installed: bool, what: str) -> None:
    """Ends the program if pip failed."""
    if not installed:
        sys.exit(f"error: installing {what} failed; pip's own message is above")


if __name__ == "__main__":
    main()
