"""Writes a Hugging Face checkpoint directory from a stream of tensors: complete or invisible, and resumable.

All is written into a hidden directory beside the final one, which is renamed at the end. A shard that is finished there is noted with its
checksum; a second run checks it and writes only the rest. Memory: one tensor at a time.
Simplification: a resumed run still passes over the tensors that it has; the finished shards are not read by value but by checksum.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cord.convert.checkpoint_files import DTYPES
from megatron_cord.errors import CordError

_LEDGER, _INDEX = "export.json", "model.safetensors.index.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 22  # bytes read at a time for a checksum


@dataclass(frozen=True)
class Shard:
    """One file: its name, and its tensors' names and shapes in the order of their bytes."""

    file: str
    shapes: dict[str, tuple[int, ...]]

    def header(self, dtype: torch.dtype) -> bytes:
        """The safetensors header, padded to whole words."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self.shapes.items():
            end = offset + prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def plan_shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Cuts the tensors, in their order, into files of at most max_bytes; a tensor that is larger has a file of its own."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


class HFDirectoryWriter:
    """Writes one directory.

    Args:
        directory: the final place.
        shards: what its weights are.
        dtype: of all tensors.
        source: what the tensors come from, as JSON; a leftover of another source is not resumed.
        resume: whether finished shards of an earlier attempt are kept.

    Raises:
        CordError: the directory exists and holds something.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: torch.dtype, source: Any, *, resume: bool = True) -> None:
        check_vacant(directory)
        self.directory, self.shards, self.dtype = directory, shards, dtype
        self.partial = directory.with_name(f".{directory.name}.partial")
        job = {"source": source, "dtype": _CODES[dtype], "shards": [[shard.file, list(shard.shapes)] for shard in shards]}
        self._job: Any = json.loads(json.dumps(job))
        self._checksums = self._kept() if resume else {}
        if not self._checksums and self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._note()
        self.kept = tuple(self._checksums)  #: files of an earlier attempt that are whole

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes all tensors in the shards' order; they are brought to the writer's precision and to the CPU one by one.

        Raises:
            OSError: the disk is full, or not writable; what is finished stays for the next attempt.
            CordError: the stream is not what was planned.
        """
        stream = iter(tensors)
        for shard in self.shards:
            if shard.file in self._checksums:
                for name in shard.shapes:
                    _expect(next(stream, None), name, shard.shapes[name])
            else:
                self._checksums[shard.file] = self._write(shard, stream)
                self._note()
        if (extra := next(stream, None)) is not None:
            raise CordError(f"{self.directory}: tensor {extra[0]} is not in the plan; the checkpoint is of another architecture")

    def publish(self, companions: dict[str, bytes]) -> None:
        """Adds the index and the files that go with the weights, and gives the directory its name."""
        if len(self.shards) > 1:
            places = {name: shard.file for shard in self.shards for name in shard.shapes}
            total = sum(prod(shape) * self.dtype.itemsize for shard in self.shards for shape in shard.shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            companions = companions | {_INDEX: (json.dumps(index, indent=2) + "\n").encode()}
        for name, content in companions.items():
            (self.partial / name).write_bytes(content)
        (self.partial / _LEDGER).unlink()
        os.replace(self.partial, self.directory)

    def _write(self, shard: Shard, stream: Iterator[tuple[str, Tensor]]) -> int:
        target = self.partial / shard.file
        unfinished = target.with_suffix(".writing")
        header = shard.header(self.dtype)
        checksum = zlib.crc32(header)
        with unfinished.open("wb", buffering=0) as file:
            _write_all(file, memoryview(header))
            for name, shape in shard.shapes.items():
                tensor = _expect(next(stream, None), name, shape).to(dtype=self.dtype, device="cpu").contiguous()
                raw = tensor.reshape(-1).view(torch.uint8).numpy().data
                checksum = zlib.crc32(raw, checksum)
                _write_all(file, raw)
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        return checksum

    def _kept(self) -> dict[str, int]:
        """Files of an earlier attempt at the same job whose bytes are still those that were written."""
        try:
            ledger = json.loads((self.partial / _LEDGER).read_text())
            noted = ledger["finished"] if ledger["job"] == self._job else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}
        return {file: checksum for file, checksum in noted.items() if _checksum(self.partial / file) == checksum}

    def _note(self) -> None:
        draft = self.partial / f".{_LEDGER}"
        draft.write_text(json.dumps({"job": self._job, "finished": self._checksums}))
        os.replace(draft, self.partial / _LEDGER)


def check_vacant(directory: Path) -> None:
    """Raises CordError if there is something where a directory shall be written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CordError(f"{directory} exists already and is not overwritten; remove it, or give another place")


def _expect(given: tuple[str, Tensor] | None, name: str, shape: tuple[int, ...]) -> Tensor:
    if given is None or given[0] != name or tuple(given[1].shape) != shape:
        found = "nothing" if given is None else f"{given[0]} {list(given[1].shape)}"
        raise CordError(f"tensor {name} {list(shape)} was planned but {found} came; the checkpoint is of another architecture")
    return given[1]


def _write_all(file: Any, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _checksum(path: Path) -> int | None:
    if not path.is_file():
        return None
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
