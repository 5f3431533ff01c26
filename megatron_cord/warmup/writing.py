"""The warmed-up checkpoint: a Hugging Face directory with the original's tensors where none was trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_cord.convert.hf.carried import Carried, files_beside
from megatron_cord.convert.hf.model_card import without_cards
from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.convert.hf.writer import HFDirectoryWriter, Shard, plan_shards
from megatron_cord.errors import CordError
from megatron_cord.warmup.parts import Parts

_SHARD_BYTES = 5 * 10**9


def plan(stored: Mapping[str, StoredTensor], carried: Carried, target: Path) -> tuple[list[Shard], torch.dtype]:
    """Return the files of the new directory, and the precision of all but carried tensors.

    Raises:
        CordError: the checkpoint mixes precisions, or the disk is too small.
    """
    dtypes = {tensor.dtype for tensor in stored.values()}
    if len(dtypes) > 1:
        several = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CordError(
            f"{next(iter(stored.values())).path.parent} mixes tensors of {several}; graft it again with one --dtype"
        )
    dtype = dtypes.pop()
    shapes = {name: tensor.shape for name, tensor in stored.items()} | carried.shapes
    shards = plan_shards(shapes, dtype, _SHARD_BYTES, carried.dtypes)
    needed = sum(shard.nbytes(dtype) for shard in shards)
    there = next(path for path in target.absolute().parents if path.exists())
    if not target.exists() and (free := shutil.disk_usage(there).free) < needed:
        raise CordError(f"{target} takes {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left; free some")
    return shards, dtype


def write_model(checkpoint: Path, target: Path, parts: Parts, changed: Mapping[str, Tensor]) -> None:
    """Write the directory; tensors pass through one by one. A directory that is there is whole, and stays.

    Args:
        checkpoint: the original, for configuration, tokenizer and the like.
        target: the new directory.
        parts: of the original.
        changed: those that are others now.

    Raises:
        CordError: the disk is full or may not be written.
    """
    if target.exists():
        return
    shards, dtype = plan(parts.stored, parts.carried, target)
    writer = HFDirectoryWriter(target, shards, dtype)
    try:
        writer.begin(resume=False)
        tensors = {**parts.stored, **parts.carried.tensors}
        writer.write((name, changed[name] if name in changed else tensor.read()) for name, tensor in tensors.items())
        writer.publish(without_cards(files_beside(checkpoint, parts.arch)))
    except OSError as error:
        raise CordError(f"{target} could not be written ({error.strerror}); free some space and start again") from None
