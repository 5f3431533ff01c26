"""Writes Megatron's distributed checkpoint from a Hugging Face checkpoint's files, one tensor at a time.

The result is complete or invisible, and loadable on any layout; the model is never in memory. Megatron plans the shards
and writes all that is not a tensor; only the tensors' bytes take another way: from the file into one buffer and from
there into this rank's file of the checkpoint. The kernel starts to write them to the disk while the next are read.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_cord.convert.hf.writer import check_vacant
from megatron_cord.convert.loading import Source, read_block
from megatron_cord.convert.names import rename_to_global
from megatron_cord.model.lalm import LALM
from megatron_cord.runtime.files import start_writing

_ShardId = tuple[str, tuple[int, ...]]  # a shard's key and its offset in the whole tensor


@dataclass(frozen=True)
class _Block:
    """The source of one shard's bytes."""

    source: Source
    rows: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, out: Tensor) -> None:
        read_block(self.source, self.rows, self.start, out)


def save_weights(
    directory: Path,
    model: LALM,
    sources: dict[str, Source],
    complete: Callable[[Path], None],
    advance: Callable[[int], None],
) -> None:
    """Write a model's weights from the files that they are in. Collective over all ranks.

    A killed writer leaves a hidden directory beside the final one, which the next writer removes: a directory with the
    final name is whole.

    Args:
        directory: the final place; it must not exist.
        model: this rank's part, of tensors without memory.
        sources: as `find_sources` of the same model.
        complete: called on rank 0 with the directory under its hidden name, to add the files beside the weights.
        advance: called with the bytes of each shard that is written.

    Raises:
        CordError: the directory exists and holds something, or a file of the source ends too early.
        CheckpointException: a rank could not write to the disk; raised on every rank, and nothing is left behind.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    main = dist.get_rank() == 0
    try:
        if main:
            check_vacant(directory)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own deprecated internals
            _save_shards(partial, model, sources, advance)
        if main:
            complete(partial)
            partial.replace(directory)
        dist.barrier()
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_shards(directory: Path, model: LALM, sources: dict[str, Source], advance: Callable[[int], None]) -> None:
    """Write the shards of this rank into an empty directory. Collective over all ranks."""
    state = model.sharded_state_dict()
    blocks: dict[_ShardId, _Block] = {}
    for name in list(state):
        holder = {name: state[name]}
        apply_factories(holder)
        state[name] = holder[name]
        for shard in nested_values(holder):
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                skip = shard.prepend_axis_num
                blocks[shard.key, tuple(shard.global_offset)] = _Block(
                    sources[rename_to_global(model, name)],
                    shard.global_shape[skip],
                    tuple(shard.global_offset[skip:]),
                    tuple(shard.local_shape),
                    shard.dtype,
                )
    dist_checkpointing.save({"model": state}, str(directory), sharded_strategy=_StreamedStrategy(blocks, advance))


class _StreamedStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """A writer in the place and the format of Megatron's."""

    def __init__(self, blocks: dict[_ShardId, _Block], advance: Callable[[int], None]) -> None:
        super().__init__("torch_dist", 1)
        self._blocks, self._advance = blocks, advance

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        shards = [shard for shard in nested_values(sharded_state_dict) if is_main_replica(shard.replica_id)]
        writer = _Writer(Path(checkpoint_dir), self._blocks, self._advance)
        save_distributed({}, storage_writer=writer, planner=_Planner(shards))


class _Planner(DefaultSavePlanner):
    """A planner of Megatron's shards like Megatron's own, which reads nothing of them but sizes."""

    def __init__(self, shards: list[Any]) -> None:
        super().__init__(flatten_state_dict=False)
        self._shards = shards
        self.objects: dict[str, io.BytesIO] = {}

    def create_local_plan(self) -> SavePlan:
        items, by_key = [], dict[str, list[Any]]()
        for shard in self._shards:
            by_key.setdefault(shard.unique_key if isinstance(shard, ShardedObject) else shard.key, []).append(shard)
        for key, shards in by_key.items():
            if isinstance(shards[0], ShardedObject):
                self.objects[key] = io.BytesIO()
                torch.save([shard.data for shard in shards], self.objects[key])
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            for shard in shards:
                offsets = torch.Size(shard.global_offset)
                sizes = torch.Size((*(1,) * shard.prepend_axis_num, *shard.local_shape))
                data = TensorWriteData(
                    ChunkStorageMetadata(offsets, sizes), TensorProperties(shard.dtype), torch.Size(shard.global_shape)
                )
                items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan


class _Writer(FileSystemWriter):
    """A writer of one file a rank."""

    def __init__(self, directory: Path, blocks: dict[_ShardId, _Block], advance: Callable[[int], None]) -> None:
        super().__init__(directory, single_file_per_rank=True)
        self._directory, self._blocks, self._advance = directory, blocks, advance

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, _Planner)
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        buffer = bytearray(max((block.nbytes for block in self._blocks.values()), default=0))
        results = []
        checked = torch.serialization.get_crc32_options()
        # The checksums of torch's archives are never read, and cost as much time as the disk.
        torch.serialization.set_crc32_options(False)
        try:
            with (self._directory / name).open("wb", buffering=0) as file:
                for item in plan.items:
                    offset = file.tell()
                    if item.type == WriteItemType.BYTE_IO:
                        file.write(planner.objects[item.index.fqn].getbuffer())
                    else:
                        self._write(file, item, buffer)
                    length = file.tell() - offset
                    start_writing(file.fileno(), offset, length)
                    results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                os.fsync(file.fileno())
        finally:
            torch.serialization.set_crc32_options(checked)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, file: Any, item: WriteItem, buffer: bytearray) -> None:
        assert item.index.offset is not None
        assert item.tensor_data is not None
        block = self._blocks[item.index.fqn, tuple(item.index.offset)]
        # A tensor on the buffer whose storage is no larger than itself: torch saves whole storages.
        tensor = torch.frombuffer(buffer, dtype=block.dtype, count=prod(block.shape)).view(block.shape)
        block.read(tensor)
        torch.save(tensor.view(item.tensor_data.chunk.sizes), file)
        self._advance(block.nbytes)
