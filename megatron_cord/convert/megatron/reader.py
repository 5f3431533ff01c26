"""Reads the weights of a Megatron checkpoint: by Hugging Face name, block by block, whatever layout wrote them.

Neither the model nor a whole tensor is ever in memory, and ranks need not communicate. torch's metadata say where each
chunk's bytes are; its elements are read from there as those of any other file. Megatron keeps the layers' tensors as
one tensor with the layer as first dimension.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.convert.inventory import inventory
from megatron_cord.convert.names import rename_to_global, tensor_map_of
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorRule

BLOCK = 1 << 25  #: bytes that are read and written at a time


class _Chunk(NamedTuple):
    """A part of a saved tensor: its first row and column, and where it lies."""

    row: int
    column: int
    stored: StoredTensor


class _Entry(NamedTuple):
    """A Megatron tensor: its key in the checkpoint and, for tensors of all layers, its layer as [layer], else []."""

    key: str
    layer: tuple[int, ...]


class SavedWeights:
    """The weights of one checkpoint.

    Args:
        checkpoint: a directory that `dist_checkpointing` wrote.
        model: the whole model of fake tensors, on one rank.
        partial: the checkpoint may lack tensors, as one of adapters does.

    Attributes:
        shapes: of the Hugging Face tensors, by name, in the order of export.
        present: the names of those that the checkpoint holds.

    Raises:
        CordError: it is no checkpoint, or lacks a tensor.
    """

    def __init__(self, checkpoint: Path, model: LALM, *, partial: bool = False) -> None:
        self._directory, self._rules = checkpoint, tensor_map_of(model).by_hf_name
        self._entries = _entries(model)
        self.shapes = {entry.name: entry.shape for entry in inventory(model)}
        try:
            self._metadata = FileSystemReader(checkpoint).read_metadata()
        except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
            raise CordError(
                f"{checkpoint} is not a whole checkpoint ({type(error).__name__}); give the directory of one"
            ) from None
        self._saved: dict[str, TensorStorageMetadata] = {}
        for key in {entry.key for entry in self._entries.values()}:
            saved = self._metadata.state_dict_metadata.get(key)
            if saved is None and partial:
                continue
            if not isinstance(saved, TensorStorageMetadata):
                raise CordError(
                    f"{checkpoint} is damaged (it has no tensor {key}); import it again, or take another checkpoint"
                )
            self._saved[key] = saved
        self.present = {name for name in self.shapes if self._entries[self._rules[name].megatron].key in self._saved}

    def common_dtype(self) -> torch.dtype:
        """Return the precision that all tensors have.

        Raises:
            CordError: they have several.
        """
        dtypes = {saved.properties.dtype for saved in self._saved.values()}
        if len(dtypes) != 1:
            several = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise CordError(f"{self._directory} holds weights of {several}; choose a precision with --dtype")
        return dtypes.pop()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor of this name in portions of some rows each, in their order.

        A portion is valid until the next one is read.

        Raises:
            CordError: a file is missing, or ends too early.
        """
        rule, shape = self._rules[name], self.shapes[name]
        entry = self._entries[rule.megatron]
        saved = self._saved[entry.key]
        rows, dtype = saved.size[len(entry.layer)], saved.properties.dtype
        part, chunks = rule.hf.index(name), list(self._chunks(entry))
        step = max(1, BLOCK // max(1, prod(shape[1:]) * dtype.itemsize))
        buffer = torch.empty(min(step, shape[0]), *shape[1:], dtype=dtype)
        for start in range(0, shape[0], step):
            out = buffer[: min(step, shape[0] - start)]
            self._fill(out, start, rule, part, rows, chunks)
            yield out

    def _fill(self, out: Tensor, start: int, rule: TensorRule, part: int, rows: int, chunks: list[_Chunk]) -> None:
        """Fill out with the rows from `start` on of one part of a rule, from the Megatron tensor's rows."""
        above, filled = 0, 0
        for piece in rule.layout.pieces(rows):
            low, high = max(start, piece.start), min(start + len(out), piece.stop)
            if piece.part == part and low < high:
                filled += _read(chunks, above + low - piece.start, out[low - start : high - start])
            above += piece.stop - piece.start
        if filled != out.numel():
            raise CordError(
                f"{self._directory} is damaged (parts of {rule.megatron} are missing); "
                "import it again, or take another checkpoint"
            )

    def _chunks(self, entry: _Entry) -> Iterator[_Chunk]:
        """Yield the chunks in which a Megatron tensor was saved."""
        saved, skip = self._saved[entry.key], len(entry.layer)
        dtype = saved.properties.dtype
        for chunk in saved.chunks:
            if tuple(chunk.offsets[:skip]) != entry.layer:
                continue
            info = self._metadata.storage_data[MetadataIndex(entry.key, chunk.offsets)]
            path = self._directory / info.relative_path
            offset = info.offset + _payload(path, info, chunk.sizes, dtype)
            row, column = (*chunk.offsets[skip:], 0)[:2]
            yield _Chunk(row, column, StoredTensor(entry.key, dtype, tuple(chunk.sizes[skip:]), path, offset))


def _entries(model: LALM) -> dict[str, _Entry]:
    """Return each tensor's entry in the checkpoint, by its name in the whole model."""
    entries = {}
    for name, value in model.sharded_state_dict().items():
        holder = {name: value}
        apply_factories(holder)
        for shard in nested_values(holder):
            if isinstance(shard, ShardedTensor):  # beside them are objects of Megatron's own
                layer = tuple(shard.global_offset[: shard.prepend_axis_num])
                entries[rename_to_global(model, name)] = _Entry(shard.key, layer)
    return entries


def _read(chunks: list[_Chunk], row: int, out: Tensor) -> int:
    """Fill out with all columns of the rows from `row` on; return how many elements were found."""
    found = 0
    for chunk in chunks:
        shape = chunk.stored.shape
        low, high = max(row, chunk.row), min(row + len(out), chunk.row + shape[0])
        if low >= high:
            continue
        target = out[low - row : high - row]
        if len(shape) > 1:
            target = target[:, chunk.column : chunk.column + shape[1]]
        chunk.stored.read_block(low - chunk.row, 0, target)
        found += target.numel()
    return found


def _payload(path: Path, info: Any, sizes: torch.Size, dtype: torch.dtype) -> int:
    """Return where in a chunk's archive its elements begin.

    Raises:
        CordError: the file is missing, the archive is damaged, or it holds another tensor than the checkpoint's
            metadata say.
    """
    try:
        with path.open("rb") as file:
            archive: Any = _Slice(file, info.offset, info.length)
            # On the meta device torch reads the archive's index alone, and keeps the elements' offset.
            tensor = torch.load(archive, map_location="meta", weights_only=True)
            if (
                tensor.shape == sizes
                and tensor.dtype == dtype
                and tensor.is_contiguous()
                and tensor.storage_offset() == 0
            ):
                return int(tensor.untyped_storage()._checkpoint_offset)
        problem = "it holds another tensor than its metadata describe"
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
    raise CordError(f"{path} is damaged ({problem}); import it again, or take another checkpoint")


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        content = self._file.read(min(len(buffer), max(0, self._length - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
