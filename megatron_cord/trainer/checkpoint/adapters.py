"""LoRA of a checkpoint, which holds adapters alone: what they are, and whether a run, and its base, are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.config import LoraConfig, ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lora.targets import LoraTarget, find_targets
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.trainer.checkpoint.progress import Progress


def base_fingerprint(checkpoint: str) -> str:
    """Return the fingerprint of a Hugging Face directory's weights: names, sizes and both ends of their files."""
    return checkpoint_fingerprint(checkpoint_directory(checkpoint), (".safetensors",))


def holds_adapters(progress: Progress) -> bool:
    """Return whether a checkpoint holds LoRA adapters in place of whole weights."""
    return bool(progress.made_with.settings.get("model", {}).get("lora", {}).get("rank"))


def saved_model_config(progress: Progress, config: ModelConfig) -> ModelConfig:
    """Return a configuration of the model with the LoRA, and the frozen parts, of the run that saved a checkpoint.

    Args:
        progress: of the checkpoint; an imported one has no LoRA.
        config: all other settings.
    """
    settings = progress.made_with.settings.get("model", {})
    given = settings.get("lora", {})
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    lora = LoraConfig(**plain)
    return replace(config, lora=lora, freeze=tuple(settings.get("freeze", ())) if lora.enabled else ())


def saved_targets(progress: Progress, arch: Architecture, config: ModelConfig) -> list[LoraTarget]:
    """Return the matrices whose LoRA a checkpoint holds."""
    saved = saved_model_config(progress, config)
    return find_targets(arch, saved.lora, saved.freeze)


def check_lora(checkpoint: Path, progress: Progress, config: ModelConfig, source: str) -> None:
    """Refuse a checkpoint with other LoRA than a run's, or with adapters of another base.

    Args:
        checkpoint: that the run begins with, or goes on from.
        progress: of it.
        config: of the run's model.
        source: what names it, for messages.

    Raises:
        CordError: what differs first.
    """
    saved, now = saved_model_config(progress, config).lora, config.lora
    if saved.enabled != now.enabled:
        raise CordError(
            f"{source} holds LoRA adapters alone; set model.lora as its run had it ({_shown(saved)}), or export it "
            f"(cord convert export {checkpoint} HF_DIR) and begin with that"
            if saved.enabled
            else f"{source} holds whole weights, and model.lora trains adapters beside model.checkpoint's; export it "
            f"(cord convert export {checkpoint} HF_DIR) and name that as model.checkpoint"
        )
    if not now.enabled:
        return
    arch = load_architecture(config.checkpoint)
    names = [
        sorted(name for target in targets for name in target.names())
        for targets in (saved_targets(progress, arch, config), find_targets(arch, now, config.freeze))
    ]
    compared: dict[str, tuple[object, object]] = {
        "rank": (saved.rank, now.rank),
        "alpha": (saved.alpha, now.alpha),
        "whole": (sorted(saved.whole), sorted(now.whole)),
        "targets": (names[0], names[1]),
    }
    for key, (old, new) in compared.items():
        if old != new:
            shown = (_first_difference(*names),) if key == "targets" else (f"{old}, not {new}",)
            raise CordError(
                f"{source} was trained with another model.lora.{key} ({shown[0]}); take its run's model.lora"
            )
    if progress.made_with.base != base_fingerprint(config.checkpoint):
        theirs = progress.made_with.settings["model"]["checkpoint"]
        raise CordError(
            f"{source} holds adapters of another base: they were trained beside {theirs} (weights "
            f"{progress.made_with.base}), and model.checkpoint={config.checkpoint} holds others "
            f"({base_fingerprint(config.checkpoint)}); name their own base"
        )


def _shown(config: LoraConfig) -> str:
    return f"rank={config.rank}, alpha={config.alpha:g}, targets={list(config.targets)}, whole={list(config.whole)}"


def _first_difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return the first matrix that one of them has alone."""
    name = min(set(old) ^ set(new))
    return f"{'it has' if name in old else 'it lacks'} {name.rsplit('.', 2)[0]}"
