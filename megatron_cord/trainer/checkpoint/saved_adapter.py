"""The weights of a checkpoint for export: whole ones, LoRA merged with its base, or LoRA alone."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cord.convert.megatron.reader import SavedWeights
from megatron_cord.convert.peft.directory import Adapter
from megatron_cord.convert.peft.merged import MergedWeights, read_factors
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.lalm import LALM
from megatron_cord.trainer.checkpoint.adapters import check_lora, saved_model_config, saved_targets
from megatron_cord.trainer.checkpoint.progress import read_progress


def open_saved(checkpoint: Path, model: LALM, base: Path) -> SavedWeights | MergedWeights:
    """Return the weights of a checkpoint under Hugging Face names. A process group must be initialised.

    Args:
        checkpoint: its directory.
        model: the whole model of fake tensors, on one rank.
        base: the Hugging Face directory that its run began with, which adapters are merged into.

    Raises:
        CordError: the checkpoint is damaged, or its adapters are of another base.
    """
    progress = read_progress(checkpoint, model.arch)
    config = saved_model_config(progress, ModelConfig(str(base)))
    if not config.lora.enabled:
        return SavedWeights(checkpoint, model)
    check_lora(checkpoint, progress, config, str(checkpoint))
    factors = read_factors(checkpoint, saved_targets(progress, model.arch, config))
    return MergedWeights(checkpoint, str(base), model, factors, config.lora.scale)


def saved_adapter(checkpoint: Path, saved: SavedWeights | MergedWeights) -> Adapter:
    """Return the LoRA of a checkpoint, with the parts that were trained whole.

    Args:
        checkpoint: its directory.
        saved: its weights.

    Raises:
        CordError: it holds no LoRA.
    """
    if not isinstance(saved, MergedWeights):
        raise CordError(f"{checkpoint} holds whole weights and no LoRA; export it without --adapter")
    made_with = read_progress(checkpoint).made_with
    lora = saved_model_config(read_progress(checkpoint), ModelConfig("")).lora
    whole = {name: torch.cat([block.clone() for block in saved.blocks(name)]) for name in sorted(saved.whole)}
    base = str(made_with.settings["model"]["checkpoint"])
    return Adapter(saved.factors, whole, lora.rank, lora.alpha, lora.dropout, made_with.base, base)
