"""The student under a configuration: architecture checked, weights read, parts frozen."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.convert import read_into
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.checkpoint.checkpoints import load_weights


def build_student(config: ModelConfig, layout: Layout) -> LALM:
    """Build this rank's part of the model with the Hugging Face checkpoint's weights."""
    model = LALM(load_architecture(config.checkpoint), layout, config.torch_dtype, config.layer_config)
    read_into(model, config.checkpoint)
    for name in config.freeze:
        part = getattr(model, name)
        if part is not None:  # the encoder and the adapter exist on the first stage only
            part.requires_grad_(False)
    return model


def read_weights(source: Path, model: LALM) -> None:
    """Give the model the weights of a checkpoint or of a Hugging Face directory. Collective.

    Raises:
        CordError: they are of another architecture, or damaged.
    """
    if not (source / "config.json").is_file():
        load_weights(source, model)
        return
    if load_architecture(source) != model.arch:
        raise CordError(f"init_from={source} is of another architecture than model.checkpoint")
    read_into(model, source)
