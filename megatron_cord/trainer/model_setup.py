"""The student under a configuration: architecture checked, weights read, parts frozen."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.convert import read_into
from megatron_cord.convert.peft.directory import check_adapter, is_adapter, read_adapter
from megatron_cord.convert.peft.stream import import_adapters
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.checkpoint.adapters import base_fingerprint, check_lora, saved_model_config
from megatron_cord.trainer.checkpoint.checkpoints import load_weights
from megatron_cord.trainer.checkpoint.progress import read_progress


def build_student(config: ModelConfig, layout: Layout, seed: int = 0) -> LALM:
    """Build this rank's part of the model with the Hugging Face checkpoint's weights.

    Args:
        config: of the model.
        layout: this rank's place.
        seed: of LoRA's initial values and its dropout.

    Raises:
        CordError: the layout deals experts, and the model has none, or as `LALM`.
    """
    arch = load_architecture(config.checkpoint)
    if layout.config.ep > 1 and arch.language.experts is None:
        raise CordError(
            f"parallel.ep={layout.config.ep} deals experts, and {config.checkpoint} (a {arch.model_type} model) has "
            "none; set parallel.ep=1"
        )
    model = LALM(arch, layout, config.torch_dtype, config.layer_config)
    read_into(model, config.checkpoint)
    choose_trained(config, model, seed)
    return model


def choose_trained(config: ModelConfig, model: LALM, seed: int) -> None:
    """Freeze what is not trained, and add LoRA where the configuration has it. Raises as `LALM.add_lora`."""
    if config.lora.enabled:
        model.add_lora(config.lora, config.freeze, seed)
    for name in config.freeze:
        part = getattr(model, name)
        if part is not None:  # the encoder and the adapter exist on the first stage only
            part.requires_grad_(False)


def build_saved(checkpoint: Path, config: ModelConfig, layout: Layout) -> tuple[LALM, int]:
    """Build the model with the weights of a checkpoint, whatever its run has trained; return it and its step.

    All its parameters are trainable; where the checkpoint holds LoRA alone, only what that run trained is.

    Raises:
        CordError: the checkpoint is of another architecture, or damaged, or its adapters are of another base.
    """
    progress = read_progress(checkpoint)
    own = saved_model_config(progress, config)
    check_lora(checkpoint, progress, own, str(checkpoint))
    model = build_student(own, layout)
    return model, load_weights(checkpoint, model)


def read_weights(source: Path, model: LALM, config: ModelConfig) -> None:
    """Give the model the weights of a checkpoint, of a Hugging Face directory, or of a PEFT adapter. Collective.

    Raises:
        CordError: they are of another architecture, or damaged, or the adapter does not fit.
    """
    if is_adapter(source):
        adapter = read_adapter(source, model.arch)
        check_adapter(adapter, config.lora, source)
        if adapter.base and adapter.base != base_fingerprint(config.checkpoint):
            raise CordError(
                f"init_from={source} is an adapter of another base: it was trained beside {adapter.base_name} (weights "
                f"{adapter.base}), and model.checkpoint={config.checkpoint} holds others "
                f"({base_fingerprint(config.checkpoint)})"
            )
        import_adapters(model, {**adapter.factors, **adapter.whole}, str(source))
        return
    if not (source / "config.json").is_file():
        load_weights(source, model)
        return
    if load_architecture(source) != model.arch:
        raise CordError(f"init_from={source} is of another architecture than model.checkpoint")
    read_into(model, source)
