"""The grafted checkpoint: everything is checked before a byte is written; weights pass through one by one.

Legend: V rows of the word embedding, H the language model's width, D the encoder's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cord.convert.graft.gguf import dequantised, gguf_file
from megatron_cord.convert.graft.sources import (
    HOP_LENGTH,
    N_FFT,
    SAMPLING_RATE,
    TextModel,
    Whisper,
    read_text_model,
    read_whisper,
)
from megatron_cord.convert.graft.tokenizer import with_placeholder
from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.convert.hf.spelling import plain_class
from megatron_cord.convert.hf.writer import HFDirectoryWriter, check_vacant, plan_shards
from megatron_cord.convert.inventory import common_dtype
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import family_of
from megatron_cord.model.families.ultravox.configuration import UltravoxConfig
from megatron_cord.model.families.ultravox.family import architecture

_SHARD_BYTES = 5 * 10**9
_TOWER, _PROJECTOR, _LANGUAGE = "audio_tower.", "multi_modal_projector.", "language_model."
_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")  # [V, H], of the text model


@dataclass(frozen=True)
class Projector:
    """The new part, with Ultravox's names.

    Attributes:
        stack_factor: encoder frames, of 20 ms each, that become one token.
        hidden_size: rows of its first layer; SwiGLU makes half as many of them.
        norm_init: of the weights of both norms.
        seed: of its random weights.
    """

    stack_factor: int = 4
    hidden_size: int = 4096
    norm_init: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class Grafted:
    """What was made.

    Attributes:
        arch: its sizes.
        parameters: of encoder, projector and language model.
        dtype: of all weights.
    """

    arch: Architecture
    parameters: dict[str, int]
    dtype: torch.dtype


def graft(llm: Path, whisper: Path, target: Path, projector: Projector, dtype: torch.dtype | None = None) -> Grafted:
    """Write the checkpoint of a speech model into `target`.

    Encoder and language model are copied; the word embedding (and the output layer) gets a row for the placeholder if
    it has none left: the mean of all rows. The projector is random, at such a scale that its output is as large as the
    word embedding's rows.

    Args:
        llm: Hugging Face directory of a text model, or a GGUF file, or the directory of one.
        whisper: Hugging Face or CTranslate2 directory of a Whisper.
        target: the new directory.
        projector: its sizes.
        dtype: of the weights; if None the text model's, and bfloat16 of one in a GGUF file.

    Raises:
        CordError: the target exists, a source is not what it must be or lacks tensors, or the disk is too small.
    """
    check_vacant(target)
    if (file := gguf_file(llm)) is None:
        return _graft(read_text_model(llm), read_whisper(whisper), target, projector, dtype)
    audio = read_whisper(whisper)
    with dequantised(file, target.with_name(f".{target.name}.llm"), dtype or torch.bfloat16) as directory:
        return _graft(read_text_model(directory), audio, target, projector, dtype)


def _graft(text: TextModel, audio: Whisper, target: Path, projector: Projector, dtype: torch.dtype | None) -> Grafted:
    """Write the checkpoint of two sources. Raises as `graft`."""
    files, placeholder = with_placeholder(text.directory, text.language.vocab_size)
    precision = dtype or common_dtype(list(text.tensors.values()))
    fields = _configuration(text, audio, projector, placeholder, precision)
    arch = architecture(UltravoxConfig(**fields))
    shapes = _shapes(fields, arch)
    _check_tensors(shapes, text, audio)
    shards = plan_shards(shapes, precision, _SHARD_BYTES)
    _check_disk(target, sum(shard.nbytes(precision) for shard in shards))
    files |= _auxiliary_files(text, audio, fields)
    writer = HFDirectoryWriter(target, shards, precision)
    try:
        writer.begin(resume=False)
        writer.write(_tensors(shapes, text, audio, projector))
        writer.publish(files)
    except OSError as error:
        raise CordError(f"{target} could not be written ({error.strerror}); free some space and graft again") from None
    counts = {
        part: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
        for part, prefix in (("encoder", _TOWER), ("projector", _PROJECTOR), ("language model", _LANGUAGE))
    }
    return Grafted(arch, counts, precision)


def _configuration(
    text: TextModel, audio: Whisper, projector: Projector, placeholder: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of config.json."""
    vocabulary = max(text.language.vocab_size, placeholder + 1)
    language = {key: value for key, value in text.config.items() if key not in ("transformers_version", "torch_dtype")}
    return {
        "architectures": ["UltravoxModel"],
        "model_type": UltravoxConfig.model_type,
        "audio_config": audio.config,
        "text_config": language | {"vocab_size": vocabulary, "dtype": _name(dtype)},
        "audio_model_id": None,
        "text_model_id": None,
        "audio_latency_block_size": None,
        "audio_token_index": placeholder,
        "stack_factor": projector.stack_factor,
        "hidden_size": projector.hidden_size,
        "norm_init": projector.norm_init,
        "projector_act": "swiglu",
        "projector_ln_mid": True,
        "tie_word_embeddings": text.language.tied_embeddings,
        "vocab_size": vocabulary,
        "dtype": _name(dtype),
    }


def _shapes(fields: dict[str, Any], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by published name, in the order of export, from a model without memory."""
    with torch.device("meta"):
        model = plain_class(arch.model_type)(UltravoxConfig(**fields))
    tensors = model.state_dict()
    return {
        name: tuple(tensors[name].shape) for rule in family_of(arch).tensor_map(arch).rules for name in rule.hf_names
    }


def _check_tensors(shapes: dict[str, tuple[int, ...]], text: TextModel, audio: Whisper) -> None:
    """Raise CordError unless both sources have every tensor that is copied, in the shape of its configuration."""
    for directory, tensors, prefix in (
        (text.directory, text.tensors, _LANGUAGE),
        (audio.directory, audio.tensors, _TOWER),
    ):
        problems = []
        for name, shape in shapes.items():
            if not name.startswith(prefix):
                continue
            own = name.removeprefix(prefix)
            wanted = (text.language.vocab_size, *shape[1:]) if own in _BY_TOKEN else shape
            if own not in tensors:
                problems.append(f"{own} is missing")
            elif tensors[own].shape != wanted:
                problems.append(f"{own} is {list(tensors[own].shape)}, wanted is {list(wanted)}")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CordError(f"{directory}: {'; '.join(problems[:3])}{more}; download the checkpoint again")


def _check_disk(target: Path, nbytes: int) -> None:
    there = next(path for path in target.absolute().parents if path.exists())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise CordError(
            f"{target} takes {nbytes / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left; free some space"
        )


def _auxiliary_files(text: TextModel, audio: Whisper, fields: dict[str, Any]) -> dict[str, bytes]:
    """Return configuration, feature extractor, and the text model's generation settings and licences."""
    samples = 2 * audio.config["max_source_positions"] * HOP_LENGTH
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": audio.config["num_mel_bins"],
        "sampling_rate": SAMPLING_RATE,
        "hop_length": HOP_LENGTH,
        "n_fft": N_FFT,
        "n_samples": samples,
        "nb_max_frames": samples // HOP_LENGTH,
        "chunk_length": samples / SAMPLING_RATE,
        "return_attention_mask": True,
    }
    made = {"config.json": fields, "preprocessor_config.json": extractor}
    kept = [
        path
        for path in sorted(text.directory.iterdir())
        if path.is_file() and path.name.startswith(("generation_config.json", "LICENSE", "NOTICE"))
    ]
    return {
        **{name: (json.dumps(content, indent=2) + "\n").encode() for name, content in made.items()},
        **{path.name: path.read_bytes() for path in kept},
    }


def _tensors(
    shapes: dict[str, tuple[int, ...]], text: TextModel, audio: Whisper, projector: Projector
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by published name, each read or made when it is its turn."""
    generator = torch.Generator().manual_seed(projector.seed)
    scale = _row_scale(text.tensors[_BY_TOKEN[0]])
    for name, shape in shapes.items():
        if name.startswith(_TOWER):
            yield name, audio.tensors[name.removeprefix(_TOWER)].read()
        elif name.startswith(_PROJECTOR):
            yield name, _new(name, shape, projector.norm_init, scale, generator)
        else:
            tensor = text.tensors[name.removeprefix(_LANGUAGE)].read()
            if missing := shape[0] - len(tensor):
                mean = tensor.mean(0, dtype=torch.float32).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(missing, -1)])
            yield name, tensor


def _new(name: str, shape: tuple[int, ...], norm: float, scale: float, generator: torch.Generator) -> Tensor:
    """Return a tensor of the projector. Its last layer maps vectors of size `norm` to some of size `scale`."""
    if len(shape) == 1:
        return torch.full(shape, norm)
    size = scale / norm if name.endswith("linear_2.weight") else 1.0
    return torch.randn(shape, generator=generator).mul_(size / math.sqrt(shape[1]))


def _row_scale(embedding: StoredTensor) -> float:
    """Return the root mean square of the word embedding's elements."""
    return float(torch.linalg.vector_norm(embedding.read(), dtype=torch.float32)) / math.sqrt(
        math.prod(embedding.shape)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
