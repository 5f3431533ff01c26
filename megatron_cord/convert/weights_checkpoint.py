"""A checkpoint of weights alone, in Megatron's distributed format: complete or invisible, and loadable on any layout."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from megatron_cord.convert.hf_directory import check_vacant
from megatron_cord.convert.loading import Source
from megatron_cord.convert.streamed_save import save_streamed
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM


def save_weights(
    directory: Path, model: LALM, sources: dict[str, Source], complete: Callable[[Path], None], advance: Callable[[int], None]
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


def saved_dtype(checkpoint: Path) -> torch.dtype:
    """The precision of a checkpoint's weights, by its metadata.

    Raises:
        CordError: it is no checkpoint, or its weights have several precisions.
    """
    try:
        saved = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    except (CheckpointException, CheckpointingException, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CordError(f"{checkpoint} is not a whole checkpoint ({type(error).__name__}); give the directory of one") from None
    # Optimizer states have precisions of their own.
    dtypes = {tensor.dtype for name, tensor in saved.items() if name.startswith(("language_model.", "audio_encoder.", "adapter."))}
    if len(dtypes) != 1:
        several = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "nothing"
        raise CordError(f"{checkpoint} holds weights of {several}; choose a precision with --dtype")
    return dtypes.pop()
