"""What a graft takes, read as far as the headers: a text model in a Hugging Face directory, and a Whisper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from megatron_cord.convert.graft import ctranslate2
from megatron_cord.convert.hf.reader import StoredTensor, stored_tensors
from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture, LanguageArchitecture
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import FAMILIES, load_architecture
from megatron_cord.model.families.decoder import DENSE
from megatron_cord.runtime.files import read_json_object

#: The encoder's sizes, as Whisper's config.json names them.
_SIZES = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions",
    "activation_function", "scale_embedding",
)  # fmt: skip
#: Of Whisper's features; the model takes no others.
HOP_LENGTH, N_FFT, SAMPLING_RATE = 160, 400, 16000


@dataclass(frozen=True)
class TextModel:
    """A text model.

    Attributes:
        directory: where it lies.
        config: its config.json.
        language: its sizes.
        tensors: by published name.
    """

    directory: Path
    config: dict[str, Any]
    language: LanguageArchitecture
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Whisper:
    """The encoder of a Whisper.

    Attributes:
        directory: where it lies.
        config: its sizes, as an Ultravox configuration has them.
        tensors: by name within the encoder.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_text_model(given: Path) -> TextModel:
    """Read a text model's configuration and the headers of its weights.

    Raises:
        CordError: as `load_architecture` and `published_tensors`; or it is no text model.
    """
    arch = load_architecture(given)
    if arch.model_type not in DENSE:
        raise CordError(
            f"{given} is a model of the family {arch.model_type}, which {_no_graft(arch)}; give a text model "
            f"({', '.join(DENSE)})"
        )
    directory = checkpoint_directory(given)
    config = read_json_object(directory / "config.json", "download the checkpoint again")
    return TextModel(directory, config, arch.language, dict(published_tensors(directory, arch)))


def _no_graft(arch: Architecture) -> str:
    return "has experts, which Ultravox's layout lacks" if arch.encoder is None else "has an encoder already"


def read_whisper(given: Path) -> Whisper:
    """Read a Whisper's sizes, the headers of its weights and what it says of its features.

    Args:
        given: a directory of Hugging Face's files, or of CTranslate2's.

    Raises:
        CordError: it is no Whisper, its files are damaged, or its features are not those that its encoder takes.
    """
    directory = checkpoint_directory(given)
    converted = directory / ctranslate2.FILE_NAME
    config, tensors = ctranslate2.read_encoder(converted) if converted.is_file() else _read_published(directory)
    _check_features(directory / "preprocessor_config.json", config)
    return Whisper(directory, config, tensors)


def _read_published(directory: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the encoder's sizes and its tensors from Hugging Face's files."""
    path = directory / "config.json"
    if not path.is_file():
        raise CordError(f"{path} does not exist; give a Hugging Face checkpoint directory")
    model_type = read_json_object(path, "download the checkpoint again").get("model_type")
    if model_type != "whisper":
        other = ", a text model or a speech model: the Whisper comes second" if model_type in FAMILIES else ""
        raise CordError(
            f"{path}: model_type is {model_type!r}{other}; give a Whisper's directory, such as that of "
            "openai/whisper-tiny or openai/whisper-large-v3"
        )
    try:
        whole = AutoConfig.from_pretrained(directory, local_files_only=True)
        config = {"model_type": "whisper", **{name: getattr(whole, name) for name in _SIZES}}
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise CordError(f"{path} is damaged ({type(error).__name__}: {why}); download the checkpoint again") from None
    tensors = {}
    for tensor in stored_tensors(directory):
        before, found, name = tensor.name.partition("encoder.")
        if found and before in ("", "model."):
            tensors[name] = tensor
    return config, tensors


def _check_features(path: Path, config: dict[str, Any]) -> None:
    """Refuse features of other sizes than the encoder's; without the file they are Whisper's usual ones."""
    if not path.is_file():
        return
    content = read_json_object(path, "download the checkpoint again")
    expected = {
        "feature_size": config["num_mel_bins"],
        "n_samples": 2 * config["max_source_positions"] * HOP_LENGTH,
        "hop_length": HOP_LENGTH,
        "n_fft": N_FFT,
        "sampling_rate": SAMPLING_RATE,
    }
    for name, wanted in expected.items():
        if (found := content.get(name, wanted)) != wanted:
            raise CordError(
                f"{path}: {name} is {found!r}, but the encoder takes {wanted} (num_mel_bins "
                f"{config['num_mel_bins']}, max_source_positions {config['max_source_positions']}); take all "
                "files from the same Whisper"
            )
