"""Reads the tensors of a Hugging Face checkpoint directory one by one, from safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cord.errors import CordError


def safetensors_files(checkpoint_dir: str | Path) -> list[Path]:
    """The checkpoint's files, by its index if it has one.

    Raises:
        CordError: no safetensors, pickled weights only, a damaged index, or a file that the index names is missing.
    """
    root = Path(checkpoint_dir)
    index = root / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [root / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CordError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from None
        missing = [str(f) for f in files if not f.is_file()]
        if missing:
            raise CordError(f"{index} names files that are not there: {', '.join(missing)}; download the checkpoint again")
        return files
    files = sorted(root.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in root.glob(pattern))
        why = f" ({', '.join(pickled)} may execute code when read; save it again with save_pretrained)" if pickled else ""
        raise CordError(f"{root} has no .safetensors file{why}")
    return files


def read_tensors(checkpoint_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, on the CPU.

    Raises:
        CordError: a file is truncated or not in the safetensors format.
    """
    for path in safetensors_files(checkpoint_dir):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CordError(f"{path} is damaged ({error}); download it again") from None
