"""Model families by Hugging Face ``model_type``: how each one's configuration is read and how its tensors are named.

Adding a family means one file here that offers ``architecture``, ``tensor_map`` and ``canonical_name``, and one line in the table below;
docs/adding-a-model.md shows how.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import qwen2_audio, text, voxtral
from megatron_cord.model.families.step_audio_2 import family as step_audio_2
from megatron_cord.model.tensor_map import TensorMap


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        architecture: reads the sizes from the Hugging Face configuration.
        tensor_map: names and layouts of all tensors of such an architecture.
        canonical_name: the published spelling of a tensor's name, given any spelling that a transformers version wrote.
        plain_class: where the same model stands that is not Megatron's, as module and name: it answers in the local engine.
        chat_template: Jinja, for families whose published processing is code rather than a template.
    """

    architecture: Callable[[PretrainedConfig], Architecture]
    tensor_map: Callable[[Architecture], TensorMap]
    canonical_name: Callable[[str], str]
    plain_class: str
    chat_template: str | None = None


FAMILIES = {
    "llama": Family(text.architecture, text.tensor_map, text.canonical_name, "transformers.LlamaForCausalLM"),
    "qwen2": Family(text.architecture, text.tensor_map, text.canonical_name, "transformers.Qwen2ForCausalLM"),
    "qwen2_audio": Family(
        qwen2_audio.architecture,
        qwen2_audio.tensor_map,
        qwen2_audio.canonical_name,
        "transformers.Qwen2AudioForConditionalGeneration",
    ),
    "step_audio_2": Family(
        step_audio_2.architecture,
        step_audio_2.tensor_map,
        step_audio_2.canonical_name,
        "megatron_cord.model.families.step_audio_2.plain_model.StepAudio2",
        step_audio_2.CHAT_TEMPLATE,
    ),
    "voxtral": Family(
        voxtral.architecture, voxtral.tensor_map, voxtral.canonical_name, "transformers.VoxtralForConditionalGeneration"
    ),
}


def load_architecture(checkpoint_dir: str | Path) -> Architecture:
    """Reads the architecture of a Hugging Face checkpoint directory.

    Raises:
        CordError: no directory, no config.json or a damaged one, a model type without a family, or a setting that the family lacks.
    """
    path = Path(checkpoint_dir) / "config.json"
    if not path.is_file():
        raise CordError(f"{path} does not exist; model.checkpoint must name a Hugging Face checkpoint directory")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CordError(f"{path} is not a model configuration ({error}); download the checkpoint again") from None
    if str(model_type) not in FAMILIES:
        raise CordError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    try:
        return FAMILIES[model_type].architecture(AutoConfig.from_pretrained(str(checkpoint_dir)))
    except CordError as error:
        raise CordError(f"{path}: {error}") from None
    except (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = " ".join(str(error).split())
        raise CordError(f"{path} is damaged ({type(error).__name__}: {why}); download the checkpoint again") from None


def family_of(architecture: Architecture) -> Family:
    """The family that made this architecture."""
    return FAMILIES[architecture.model_type]
