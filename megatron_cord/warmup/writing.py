"""The warmed-up checkpoint: a Hugging Face directory with all of the original's tensors but the adapter's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_cord.convert.auxiliary_files import read_auxiliary_files
from megatron_cord.convert.hf_reader import StoredTensor
from megatron_cord.convert.hf_writer import HFDirectoryWriter, Shard, plan_shards
from megatron_cord.convert.model_card import without_cards
from megatron_cord.errors import CordError

_SHARD_BYTES = 5 * 10**9


def plan(stored: Mapping[str, StoredTensor], target: Path) -> tuple[list[Shard], torch.dtype]:
    """Return the files of the new directory, and their precision.

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
    shards = plan_shards({name: tensor.shape for name, tensor in stored.items()}, dtype, _SHARD_BYTES)
    needed = sum(shard.nbytes(dtype) for shard in shards)
    there = next(path for path in target.absolute().parents if path.exists())
    if not target.exists() and (free := shutil.disk_usage(there).free) < needed:
        raise CordError(f"{target} takes {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left; free some")
    return shards, dtype


def write_model(
    checkpoint: Path, target: Path, stored: Mapping[str, StoredTensor], changed: Mapping[str, Tensor]
) -> None:
    """Write the directory; tensors pass through one by one. A directory that is there is whole, and stays.

    Args:
        checkpoint: the original, for configuration, tokenizer and the like.
        target: the new directory.
        stored: all tensors of the original by published name, in the order of export.
        changed: those that are others now.

    Raises:
        CordError: the disk is full or may not be written.
    """
    if target.exists():
        return
    shards, dtype = plan(stored, target)
    writer = HFDirectoryWriter(target, shards, dtype)
    try:
        writer.begin(resume=False)
        writer.write((name, changed[name] if name in changed else tensor.read()) for name, tensor in stored.items())
        writer.publish(without_cards(read_auxiliary_files(checkpoint)))
    except OSError as error:
        raise CordError(f"{target} could not be written ({error.strerror}); free some space and start again") from None
