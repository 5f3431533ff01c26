"""A text model in a GGUF file, dequantised into a Hugging Face directory that lasts as long as a graft takes.

transformers reads the file: sizes, tokenizer, chat template and weights (packages gguf and accelerate). Everything but
the weights is read first, so that a file that cannot be used is refused before they are.

What it simplifies: the whole model is in memory at once; the tokenizer is what transformers makes of the file, which
may split digits in another way than the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import FAMILIES
from megatron_cord.model.families.decoder import DENSE

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "accelerate")  # that transformers needs for such files
_FAILURES = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)


def gguf_file(given: Path) -> Path | None:
    """Return the GGUF file that is given: itself, or the only one in a directory without a config.json.

    Raises:
        CordError: the directory holds several.
    """
    if given.suffix == SUFFIX and given.is_file():
        return given
    if not given.is_dir() or (given / "config.json").is_file():
        return None
    files = sorted(path for path in given.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    if len(files) > 1:
        raise CordError(f"{given} holds {', '.join(path.name for path in files)}; give one of the files")
    return files[0] if files else None


def gguf_architecture(file: Path) -> Architecture:
    """Return the sizes of the text model in a GGUF file; its weights are not read.

    Raises:
        CordError: as `dequantised` about packages and the file's kind.
    """
    _check_packages(file)
    config = _read_config(file)
    return FAMILIES[config.model_type].architecture(config)


@contextmanager
def dequantised(file: Path, scratch: Path, dtype: torch.dtype) -> Iterator[Path]:
    """Enter with a Hugging Face directory of the model in a GGUF file; it is removed when the block ends.

    Args:
        file: the GGUF file.
        scratch: the directory, which is made; what an interrupted call left there is removed first.
        dtype: of the weights.

    Raises:
        CordError: a package is missing, the file is damaged or of a kind that transformers does not read, it has no
            chat template, or memory or disk are too small.
    """
    _check_packages(file)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(file, scratch, dtype)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_packages(file: Path) -> None:
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise CordError(
            f"{file}: reading GGUF needs the package {' and '.join(missing)}; pip install megatron_cord[gguf]"
        )


def _source(file: Path) -> dict[str, Any]:
    return {"gguf_file": file.name, "local_files_only": True}


def _read_config(file: Path) -> Any:
    """Return transformers' configuration of a supported kind. Raises CordError."""
    config = _load(AutoConfig, file, _source(file))
    if config.model_type not in DENSE:
        raise CordError(f"{file} is a {config.model_type}, which is not supported; choose one of {', '.join(DENSE)}")
    return config


def _write(file: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write the model's directory. Raises CordError."""
    source = _source(file)
    config = _read_config(file)
    tokenizer, marks = _load(AutoTokenizer, file, source), _marks(file)
    for name, number in marks.items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of texts
    if not tokenizer.chat_template:
        raise CordError(f"{file} has no chat template; give an instruction-tuned model")
    with torch.device("meta"):
        count = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_config(config).parameters())
    needed, free = 2 * count * torch.float32.itemsize, psutil.virtual_memory().available
    if needed > free:
        raise CordError(
            f"{file}: dequantising {count / 1e6:.0f}M parameters takes {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free; give the original Hugging Face directory"
        )
    model = _load(AutoModelForCausalLM, file, source | {"dtype": dtype})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = dtype
    for settings in (model.config, model.generation_config):
        for name in ("bos", "eos", "pad"):
            setattr(settings, f"{name}_token_id", marks.get(name))
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        for path in file.parent.iterdir():
            if path.is_file() and path.name.startswith(("LICENSE", "NOTICE")):
                shutil.copy(path, directory)
    except (OSError, SafetensorError) as error:
        raise CordError(f"{directory} could not be written ({error}); free some space") from None


def _marks(file: Path) -> dict[str, int]:
    """Return the ids of the tokens that begin and end texts, which transformers takes for each other.

    Raises:
        CordError: the file has scaled rotary positions, which transformers would leave out.
    """
    from gguf import GGUFReader

    reader, marks = GGUFReader(file), {}
    if any(".rope.scaling." in key for key in reader.fields) or any("rope_freqs" in t.name for t in reader.tensors):
        raise CordError(
            f"{file} has scaled rotary positions, which are not read from GGUF; give the original directory of Hugging "
            "Face's files"
        )
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (field := reader.get_field(f"tokenizer.ggml.{key}_token_id")) is not None:
            marks[name] = int(field.contents())
    return marks


def _load(cls: Any, file: Path, source: dict[str, Any]) -> Any:
    """Load with a class of transformers', without its remarks on files that are what they have to be."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return cls.from_pretrained(file.parent, **source)
    except _FAILURES as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise CordError(f"{file} cannot be read as GGUF ({why}); give the original Hugging Face directory") from None
    finally:
        transformers_logging.set_verbosity(level)
