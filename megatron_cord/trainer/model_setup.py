"""The student under a configuration: architecture checked, weights read, parts frozen."""

from __future__ import annotations

from megatron_cord.convert import read_into
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout


def build_student(config: ModelConfig, layout: Layout) -> LALM:
    """Build this rank's part of the model with the Hugging Face checkpoint's weights."""
    model = LALM(load_architecture(config.checkpoint), layout, config.torch_dtype, config.layer_config)
    read_into(model, config.checkpoint)
    for name in config.freeze:
        part = getattr(model, name)
        if part is not None:  # the encoder and the adapter exist on the first stage only
            part.requires_grad_(False)
    return model
