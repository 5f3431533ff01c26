"""Model families by Hugging Face ``model_type``: one file each, or one folder where a family needs modules of its own.

Every module here with a tuple ``FAMILIES`` is found by itself, so that training a new family takes a new file and no
line elsewhere; its class for SGLang's servers, where one is needed, is registered by a module in
rollout/sglang/plugin/external/cord_models. docs/adding-a-model.md shows how. The other modules here are what several
families share: ``parts``, ``decoder``, ``base``, ``plain_*``.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families.base import Family

__all__ = ["FAMILIES", "Family", "configuration_for", "family_of", "load_architecture", "model_type_of"]


def _find_families() -> dict[str, Family]:
    """Return the families of all modules in this package, by model type."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found: list[Family] = [family for module in modules for family in getattr(module, "FAMILIES", ())]
    return {family.model_type: family for family in sorted(found, key=lambda family: family.model_type)}


FAMILIES = _find_families()

#: Speech models that have no family, and what it would need (docs/adding-a-model.md).
_LACKING = dict.fromkeys(
    ("granite_speech", "granite_speech_plus"),
    "it needs a Conformer encoder, a Q-Former and LoRA for recordings alone",
)


def load_architecture(checkpoint_dir: str | Path) -> Architecture:
    """Read the architecture of a Hugging Face checkpoint directory.

    Raises:
        CordError: no directory, no config.json or a damaged one, a model type without a family, or a setting that the
            family lacks.
    """
    path = checkpoint_directory(checkpoint_dir) / "config.json"
    if not path.is_file():
        raise CordError(f"{path} does not exist; give a Hugging Face checkpoint directory")
    try:
        text = path.read_text()
        model_type = json.loads(text).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CordError(f"{path} is not a model configuration ({error}); download the checkpoint again") from None
    if str(model_type) not in FAMILIES:
        why = f" ({_LACKING[str(model_type)]})" if str(model_type) in _LACKING else ""
        raise CordError(f"{path}: model_type {model_type!r} is not supported{why}; supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type].architecture(_configuration(path.parent, text))
    except CordError as error:
        raise CordError(f"{path}: {error}") from None
    except (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = " ".join(str(error).split())
        raise CordError(f"{path} is damaged ({type(error).__name__}: {why}); download the checkpoint again") from None


def configuration_for(checkpoint_dir: str | Path, model_class: Any) -> Any:
    """Return a copy of a directory's configuration for transformers' class; None where the class reads another one.

    The directory is one that `load_architecture` accepted.
    """
    path = checkpoint_directory(checkpoint_dir)
    configuration = _configuration(path, (path / "config.json").read_text())
    return copy.deepcopy(configuration) if type(configuration) is model_class.config_class else None


@lru_cache(maxsize=8)
def _configuration(directory: Path, text: str) -> Any:
    """Return transformers' configuration of a directory's config.json, which has this text; read once a process.

    A run's parts each ask for it, and transformers checks each field of a configuration for tens of milliseconds.
    """
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def model_type_of(checkpoint_dir: str | Path) -> str | None:
    """Return what a directory's config.json names as its model type; None without a file that does."""
    try:
        found = json.loads((Path(checkpoint_dir) / "config.json").read_text()).get("model_type")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def family_of(architecture: Architecture) -> Family:
    """Return the family that made this architecture."""
    return FAMILIES[architecture.model_type]
