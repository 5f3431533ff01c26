"""Reads the tensors of a Hugging Face checkpoint directory one by one, from safetensors only.

Headers are read first and say where each tensor lies; a tensor's bytes are read on demand, into memory of its own.
Mapped files would keep every page that was touched in the process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.runtime.log import info_once

_BLOCK = 1 << 24  # bytes read at a time of a tensor that is sliced or changes precision
#: weights in another layout, of which no model is made: of an adapter, and of the tools of a model's authors
_OTHERS = ("adapter_", "consolidated")
#: the format's names of what a model's weights may be
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: as the file spells it.
        dtype: of its elements.
        shape: sizes.
        path: the file.
        offset: of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor, onto the CPU.

        Raises:
            CordError: the file ends before the tensor does.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        self._read_bytes(0, out)
        return out

    def portions(self, nbytes: int) -> Iterator[Tensor]:
        """Yield the tensor in portions of about so many bytes, of some rows each; one without rows at once.

        A portion is valid until the next one is read. Raises as `read`.
        """
        if not self.shape:
            yield self.read()
            return
        step = max(1, nbytes // max(1, prod(self.shape[1:]) * self.dtype.itemsize))
        buffer = torch.empty(min(step, self.shape[0]), *self.shape[1:], dtype=self.dtype)
        for start in range(0, self.shape[0], step):
            out = buffer[: min(step, self.shape[0] - start)]
            self.read_block(start, 0, out)
            yield out

    def read_block(self, row: int, column: int, out: Tensor) -> None:
        """Fill out with the rows from `row` on, and of them the columns from `column` on; only these rows are read.

        Args:
            row: the first.
            column: the first; 0 for a tensor of one dimension.
            out: [rows, ...] of any precision on any device; all sizes but the first two are the tensor's.

        Raises:
            CordError: the file ends before the block does.
        """
        width = prod(self.shape[1:])
        whole = out.shape[1:] == self.shape[1:]
        if whole and out.dtype == self.dtype and out.is_contiguous() and out.device.type == "cpu":
            self._read_bytes(row * width, out)
            return
        step = max(1, _BLOCK // max(1, width * self.dtype.itemsize))
        scratch = torch.empty(min(step, len(out)), *self.shape[1:], dtype=self.dtype)
        for start in range(0, len(out), step):
            target = out[start : start + step]
            block = scratch[: len(target)]
            self._read_bytes((row + start) * width, block)
            target.copy_(block if whole else block[:, column : column + out.shape[1]])

    def _read_bytes(self, element: int, out: Tensor) -> None:
        """Fill a contiguous tensor of the file's precision with the elements from this one on."""
        view, done = out.reshape(-1).view(torch.uint8).numpy().data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + element * self.dtype.itemsize)
            while done < out.nbytes and (count := file.readinto(view[done:])):
                done += count
        if done < out.nbytes:
            raise CordError(f"{self.path} is damaged (it ends within tensor {self.name}); download it again")


def safetensors_files(checkpoint_dir: str | Path) -> list[Path]:
    """Return the checkpoint's files as `from_pretrained` chooses them: model.safetensors, else those of the index.

    Where there is neither, as in a download without its index, they are all that lie there. Other safetensors files
    beside them, such as the same weights in the layout of another tool, are left alone and named once.

    Raises:
        CordError: no safetensors, an adapter or pickled weights only, a damaged index, or a file that the index names
            is missing.
    """
    root = checkpoint_directory(checkpoint_dir)
    # Hidden files are what copying from other systems leaves behind ("._model.safetensors").
    present = sorted(path for path in root.glob("*.safetensors") if not path.name.startswith("."))
    whole, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if whole in present:
        files = [whole]
    elif index.is_file():
        files = _indexed(index)
    else:
        files = [path for path in present if not path.name.startswith(_OTHERS)]
    if stray := [path.name for path in present if path not in files and files]:
        info_once(f"{root}: {', '.join(stray)} beside the model's own weights is not read")
    if not files:
        raise CordError(f"{root} has no .safetensors file{_instead(root, present)}")
    return files


def _indexed(index: Path) -> list[Path]:
    """Return the files that the index names."""
    try:
        files = [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CordError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from None
    if missing := [str(path) for path in files if not path.is_file()]:
        raise CordError(f"{index} names files that are not there: {', '.join(missing)}; download the checkpoint again")
    return files


def _instead(root: Path, others: list[Path]) -> str:
    """Say what lies in a directory without a model's weights, and what to do with it."""
    if any(path.name.startswith("adapter_model") for path in others):
        return (
            " of a model but an adapter's; merge it into its base model and save that (peft: merge_and_unload), or "
            "name its base here and the adapter as init_from, with model.lora"
        )
    if others:
        return f" of a model in Hugging Face's layout but {', '.join(p.name for p in others)}; use its converted form"
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in root.glob(pattern))
    if not pickled:
        return ""
    return (
        f", and {', '.join(pickled)} may execute code when read; if you trust who made it, convert it once with "
        f"transformers: AutoModel.from_pretrained('{root}').save_pretrained('{root}-safetensors'), through the "
        "class that config.json names"
    )


def stored_tensors(checkpoint_dir: str | Path) -> list[StoredTensor]:
    """Return every tensor of the checkpoint, file by file, in the order of their bytes; only headers are read.

    Raises:
        CordError: as `safetensors_files`; files that are truncated or not in the safetensors format, all named at once,
            or a tensor that is no floating-point weight.
    """
    files = safetensors_files(checkpoint_dir)
    damaged = [f"{path} is damaged ({problem})" for path in files if (problem := _damage(path)) is not None]
    if damaged:
        raise CordError("; ".join(damaged) + "; download it again")
    return [tensor for path in files for tensor in _header(path)]


def read_tensors(checkpoint_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint, on the CPU.

    Raises:
        CordError: as `stored_tensors`.
    """
    for tensor in stored_tensors(checkpoint_dir):
        yield tensor.name, tensor.read()


def _damage(path: Path) -> str | None:
    """Return what is wrong with the file: the library checks that header, offsets and the file's size agree."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return str(error)


def _header(path: Path) -> list[StoredTensor]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CordError(
                f"{path}: tensor {name} is of type {entry['dtype']}; quantised weights cannot be trained, "
                "use the original ones"
            )
        tensors.append(
            StoredTensor(
                name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0]
            )
        )
    return tensors
