"""Writes a Hugging Face checkpoint directory: complete or invisible, and resumable.

All files go into a hidden directory beside the final one, which is renamed at the end. A finished shard there has a
file with its checksum beside it; a second run verifies it and writes only the rest. Several ranks can write shards of
one directory.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cord.convert.hf.reader import DTYPES
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import start_writing, write_atomic

_JOB, _INDEX = "export.json", "model.safetensors.index.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 22  # bytes read at a time for a checksum


@dataclass(frozen=True)
class Shard:
    """One file: its name, and its tensors' names and shapes in the order of their bytes.

    All methods take the precision of the tensors that have none of their own.

    Attributes:
        file: its name.
        shapes: by name.
        own_dtypes: precisions of tensors that keep their own, by name; of other files' tensors too.
    """

    file: str
    shapes: dict[str, tuple[int, ...]]
    own_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the precision of a tensor."""
        return self.own_dtypes.get(name, dtype)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of its tensors."""
        return sum(prod(shape) * self.dtype_of(name, dtype).itemsize for name, shape in self.shapes.items())

    def header(self, dtype: torch.dtype) -> bytes:
        """Return the safetensors header, padded to whole words."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self.shapes.items():
            own = self.dtype_of(name, dtype)
            end = offset + prod(shape) * own.itemsize
            entries[name] = {"dtype": _CODES[own], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def plan_shards(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_bytes: int,
    own_dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[Shard]:
    """Divide the tensors, in their order, into files of at most max_bytes; a larger tensor has a file of its own.

    Args:
        shapes: by name.
        dtype: of all that own_dtypes does not name.
        max_bytes: of the tensors in one file.
        own_dtypes: precisions of tensors that keep their own, by name.
    """
    own = own_dtypes or {}
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * own.get(name, dtype).itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0], own)]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group, own) for i, group in enumerate(groups, start=1)
    ]


class HFDirectoryWriter:
    """The writer of one directory. Call `begin` first and `publish` last, on one rank each.

    Args:
        directory: the final place.
        shards: what its weights are.
        dtype: of all tensors that have no precision of their own.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: torch.dtype) -> None:
        self.directory, self.shards, self.dtype = directory, shards, dtype
        self.partial = directory.with_name(f".{directory.name}.partial")

    def begin(self, source: Any = None, *, resume: bool = True) -> None:
        """Make the hidden directory, or continue in that of an earlier attempt.

        Args:
            source: what the tensors come from, as JSON; a leftover of another source is not resumed.
            resume: whether finished shards of an earlier attempt may be kept.

        Raises:
            CordError: the directory exists and holds something.
        """
        check_vacant(self.directory)
        job = {
            "source": source,
            "dtype": _CODES[self.dtype],
            "shards": [
                [shard.file, [[name, _CODES[shard.dtype_of(name, self.dtype)]] for name in shard.shapes]]
                for shard in self.shards
            ],
        }
        text, path = json.dumps(job), self.partial / _JOB
        if self.partial.exists() and not (resume and path.is_file() and path.read_text() == text):
            shutil.rmtree(self.partial)
        write_atomic(path, text)

    def write_files(
        self, read: Callable[[str], Iterable[Tensor]], shards: Sequence[Shard], advance: Callable[[int], None]
    ) -> int:
        """Write some of the shards, except those that an earlier attempt finished and whose checksum is still right.

        Args:
            read: returns the tensor of a name, in portions of some rows each.
            shards: this rank's share.
            advance: called with the bytes of each portion that is written, and of each shard that was finished before.

        Returns:
            How many were finished before.

        Raises:
            OSError: the disk is full, or not writable; finished shards stay for the next attempt.
            CordError: a tensor is not what was planned.
        """
        kept = 0
        for shard in shards:
            if self._is_finished(shard):
                kept += 1
                advance(shard.nbytes(self.dtype))
            else:
                self._write(shard, lambda name, shape: read(name), advance)
        return kept

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all shards from a stream of all tensors in the shards' order.

        Raises:
            OSError: the disk is full, or not writable.
            CordError: the stream is not what was planned.
        """
        stream = iter(tensors)
        for shard in self.shards:
            self._write(shard, lambda name, shape: (_expect(next(stream, None), name, shape),), lambda portion: None)
        if (extra := next(stream, None)) is not None:
            raise CordError(
                f"{self.directory}: tensor {extra[0]} is not in the plan; the checkpoint is of another architecture"
            )

    def publish(self, auxiliary_files: dict[str, bytes]) -> None:
        """Add the index and the auxiliary files, and give the directory its name."""
        if len(self.shards) > 1:
            places = {name: shard.file for shard in self.shards for name in shard.shapes}
            total = sum(shard.nbytes(self.dtype) for shard in self.shards)
            index = {"metadata": {"total_size": total}, "weight_map": places}
            auxiliary_files = auxiliary_files | {_INDEX: (json.dumps(index, indent=2) + "\n").encode()}
        for name, content in auxiliary_files.items():
            (self.partial / name).write_bytes(content)
        for shard in self.shards:
            self._checksum_file(shard).unlink()
        (self.partial / _JOB).unlink()
        self.partial.replace(self.directory)

    def _checksum_file(self, shard: Shard) -> Path:
        """Return the path of a finished shard's checksum."""
        return self.partial / f".{shard.file}.json"

    def _is_finished(self, shard: Shard) -> bool:
        try:
            return bool(json.loads(self._checksum_file(shard).read_text()) == _checksum(self.partial / shard.file))
        except (OSError, ValueError):
            return False

    def _write(
        self, shard: Shard, read: Callable[[str, tuple[int, ...]], Iterable[Tensor]], advance: Callable[[int], None]
    ) -> None:
        target = self.partial / shard.file
        unfinished = target.with_suffix(".writing")
        header = shard.header(self.dtype)
        checksum = zlib.crc32(header)
        with unfinished.open("wb", buffering=0) as file:
            _write_all(file, memoryview(header))
            for name, shape in shard.shapes.items():
                rows = 0
                for portion in read(name, shape):
                    tensor = portion.to(dtype=shard.dtype_of(name, self.dtype), device="cpu").contiguous()
                    raw = tensor.reshape(-1).view(torch.uint8).numpy().data
                    checksum = zlib.crc32(raw, checksum)
                    offset = file.tell()
                    _write_all(file, raw)
                    start_writing(file.fileno(), offset, len(raw))
                    rows += len(tensor) if shape else 1
                    advance(len(raw))
                if rows != (shape[0] if shape else 1):
                    raise CordError(
                        f"{self.directory}: tensor {name} {list(shape)} was planned but {rows} rows came; "
                        "export it again"
                    )
            os.fsync(file.fileno())
        unfinished.replace(target)
        write_atomic(self._checksum_file(shard), json.dumps(checksum))


def check_vacant(directory: Path) -> None:
    """Raise CordError if there is something where a directory is to be written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CordError(f"{directory} exists already and is not overwritten; remove it, or give another place")


def _expect(given: tuple[str, Tensor] | None, name: str, shape: tuple[int, ...]) -> Tensor:
    if given is None or given[0] != name or tuple(given[1].shape) != shape:
        found = "nothing" if given is None else f"{given[0]} {list(given[1].shape)}"
        raise CordError(
            f"tensor {name} {list(shape)} was planned but {found} came; the checkpoint is of another architecture"
        )
    return given[1]


def _write_all(file: Any, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, which is faster to compute than a SHA-256. Raises OSError if it cannot be read."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
