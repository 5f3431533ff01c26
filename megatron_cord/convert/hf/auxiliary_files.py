"""The auxiliary files of a Hugging Face directory: configuration, tokenizer, processor, chat template, code.

They are all files but the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory

#: weights in any format, and their indices: never carried over
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def read_auxiliary_files(hf_dir: Path, carried: Sequence[str] = ()) -> dict[str, bytes]:
    """Return all files but weights and hidden ones, by name; folders are left out.

    Args:
        hf_dir: the directory.
        carried: names of weight files that are taken nevertheless, without reading what they mean
            (`Family.carries_files`).

    Raises:
        CordError: there is no config.json.
    """
    directory = checkpoint_directory(hf_dir)
    if not (directory / "config.json").is_file():
        raise CordError(f"{directory / 'config.json'} does not exist; give a Hugging Face checkpoint directory")
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files if path.name in carried or not path.name.endswith(_WEIGHTS)}


def with_dtype(files: dict[str, bytes], dtype: torch.dtype) -> dict[str, bytes]:
    """Return the same files with the weights' precision in config.json, wherever it names one."""
    config = json.loads(files["config.json"])
    changed = _replace_dtypes(config, str(dtype).removeprefix("torch."))
    if changed == config:
        return files
    return files | {"config.json": (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()}


def _replace_dtypes(node: Any, dtype: str) -> Any:
    if not isinstance(node, dict):
        return node
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _replace_dtypes(value, dtype)
        for key, value in node.items()
    }
