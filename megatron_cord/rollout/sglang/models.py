"""Which models SGLang servers of this project run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.model.families import FAMILIES, load_architecture


@dataclass(frozen=True)
class ServedModel:
    """What requests to a server must know of its model.

    Attributes:
        model_type: of the checkpoint.
        max_clips: how many recordings one prompt may have.
        takes_ids: whether prompts with recordings are sent as ids, with one placeholder a clip; otherwise as text.
        experts: layers, and experts that each chooses for a token; None without a mixture of experts.
    """

    model_type: str
    max_clips: float
    takes_ids: bool
    experts: tuple[int, int] | None = None


def served_model(checkpoint_dir: str | Path) -> ServedModel:
    """Return how servers take a checkpoint.

    Raises:
        CordError: as `load_architecture`, or servers do not run the family, or not with this text model.
    """
    arch = load_architecture(checkpoint_dir)
    family = FAMILIES[arch.model_type]
    if family.sglang_max_clips is None:
        served = ", ".join(name for name, other in FAMILIES.items() if other.sglang_max_clips is not None)
        raise CordError(
            f"{checkpoint_dir}: SGLang servers run {served} alone, not {family.model_type}; use rollout.engine=local "
            "(docs/rollout.md describes what is missing)"
        )
    language = arch.language
    if arch.encoder is not None and language.experts is not None and language.experts.shared_ffn_hidden_size:
        raise CordError(
            f"{checkpoint_dir}: SGLang servers do not run {family.model_type} around a text model with a shared expert "
            "(qwen2_moe), whose class there takes no embeddings; use rollout.engine=local"
        )
    experts = None if language.experts is None else (language.num_layers, language.experts.per_token)
    return ServedModel(family.model_type, family.sglang_max_clips, family.sglang_takes_ids, experts)
