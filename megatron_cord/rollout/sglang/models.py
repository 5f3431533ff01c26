"""Which models SGLang servers of this project run."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.model.families import FAMILIES, load_architecture


def served_model(checkpoint_dir: str | Path) -> tuple[str, float]:
    """Return the checkpoint's model type, and how many recordings one prompt of it may have.

    Raises:
        CordError: as `load_architecture`, or servers do not run the family, or not with this language model.
    """
    arch = load_architecture(checkpoint_dir)
    model_type = arch.model_type
    max_clips = FAMILIES[model_type].sglang_max_clips
    if max_clips is not None and not FAMILIES[model_type].sglang_serves(arch):
        raise CordError(
            f"{checkpoint_dir}: SGLang servers run {model_type} with its published kind of language model alone; use "
            "rollout.engine=local"
        )
    if max_clips is None:
        served = ", ".join(name for name, family in FAMILIES.items() if family.sglang_max_clips is not None)
        raise CordError(
            f"{checkpoint_dir}: SGLang servers run {served} alone, not {model_type}; use rollout.engine=local "
            "(docs/rollout.md describes what is missing)"
        )
    return model_type, max_clips
