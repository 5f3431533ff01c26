"""A checkpoint of weights alone, in Megatron's distributed format: complete or invisible, and loadable on any layout."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_cord.convert.hf_directory import check_vacant
from megatron_cord.convert.loading import Source
from megatron_cord.convert.streamed_save import save_streamed
from megatron_cord.model.lalm import LALM


def save_weights(
    directory: Path,
    model: LALM,
    sources: dict[str, Source],
    complete: Callable[[Path], None],
    advance: Callable[[int], None],
) -> None:
    """Writes a model's weights from the files that they are in. Collective over all ranks.

    A killed writer leaves a hidden directory beside the final one, which the next one removes: what has the name is whole.

    Args:
        directory: the final place; it must not exist.
        model: this rank's part, of tensors without memory.
        sources: where its parameters come from.
        complete: called on rank 0 with the directory still under a hidden name, to add what goes with the weights.
        advance: called with the bytes of each shard that is written.

    Raises:
        CordError: the directory exists and holds something, or a file of the source ends too early.
        Exception: what the disk's refusal becomes in torch's writers; nothing is left behind.
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
            warnings.simplefilter("ignore")  # torch's remarks on its own deprecated internals
            save_streamed(partial, model, sources, advance)
        if main:
            complete(partial)
            os.replace(partial, directory)
        dist.barrier()
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
