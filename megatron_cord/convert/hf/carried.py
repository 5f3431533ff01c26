"""Tensors of a checkpoint that belong to parts which are not trained here: passed on bit by bit.

An omni model's files hold its speech generator and its vision tower beside what is trained (`Family.carries`). An
import keeps these tensors, in their own precisions, beside the imported weights, and an export writes them behind the
model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_cord.convert.hf.auxiliary_files import read_auxiliary_files
from megatron_cord.convert.hf.reader import StoredTensor, stored_tensors
from megatron_cord.convert.hf.writer import HFDirectoryWriter, plan_shards
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import family_of

_SHARD_BYTES = 5 * 10**9
_PORTION = 1 << 25  # bytes that are read and written at a time


@dataclass(frozen=True)
class Carried:
    """The tensors of a checkpoint that are passed on.

    Attributes:
        tensors: where they lie, by name; none for most families.
        parts: the beginnings of names under which the family has such parts.
    """

    tensors: dict[str, StoredTensor]
    parts: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their sizes, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Their precisions, by name."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in portions of some rows each; a portion is valid until the next one is read."""
        return self.tensors[name].portions(_PORTION)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the number of tensors and of their elements, by part."""
        tensors, elements = Counter[str](), Counter[str]()
        for name, tensor in self.tensors.items():
            part = next(part for part in self.parts if name.startswith(part))
            tensors[part] += 1
            elements[part] += prod(tensor.shape)
        return {part: (tensors[part], elements[part]) for part in self.parts if part in tensors}

    def summary(self) -> str:
        """Return how many there are, for a line of text; empty for a family that has none."""
        if not self.parts:
            return ""
        by_part = ", ".join(f"{part.rstrip('.')} {tensors}" for part, (tensors, _) in self.counts().items())
        return f", {len(self.tensors)} carried unchanged" + (f" ({by_part})" if by_part else "")


def read_carried(hf_dir: str | Path, arch: Architecture) -> Carried:
    """Return the tensors that are passed on; only headers are read.

    Args:
        hf_dir: a Hugging Face directory, or the folder in which `write_beside` put them.
        arch: of its model.

    Raises:
        CordError: as `stored_tensors`.
    """
    parts, directory = family_of(arch).carries, checkpoint_directory(hf_dir)
    if not parts or not any(directory.glob("*.safetensors")):  # an import of a thinker alone has none
        return Carried({}, parts)
    return Carried(
        {tensor.name: tensor for tensor in stored_tensors(directory) if tensor.name.startswith(parts)}, parts
    )


def files_beside(hf_dir: str | Path, arch: Architecture) -> dict[str, bytes]:
    """Return the auxiliary files, with those weight files that the family passes on unread."""
    return read_auxiliary_files(Path(hf_dir), family_of(arch).carries_files)


def write_beside(directory: Path, files: dict[str, bytes], carried: Carried) -> None:
    """Write a folder of auxiliary files and carried tensors, which `read_carried` reads again.

    Raises:
        OSError: the disk is full, or not writable.
    """
    planned = plan_shards(carried.shapes, torch.float32, _SHARD_BYTES, carried.dtypes) if carried.tensors else []
    # Not named as a model's weights, of which they are a part.
    shards = [replace(shard, file=shard.file.replace("model", "carried", 1)) for shard in planned]
    writer = HFDirectoryWriter(directory, shards, torch.float32)
    writer.begin(resume=False)
    writer.write_files(carried.blocks, shards, lambda nbytes: None)
    writer.publish(files)
