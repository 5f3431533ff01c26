"""The encoder of a Whisper that was converted for CTranslate2 (model.bin), as faster-whisper takes it.

Only headers are read. Query, key and value are rows of one matrix there, so each is a tensor of its own in the file.
The format is that of CTranslate2's model specifications from binary version 4 on: strings with their length, then for
each variable its shape, its type and its bytes.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.errors import CordError

FILE_NAME = "model.bin"
_OLDEST_VERSION = 4
_DTYPES = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}  # others are integers
_HEAD_SIZE = 64  # of every published Whisper
_ENCODER = "encoder/"
#: The parts of a layer: CTranslate2's name, and Hugging Face's.
_LINEARS = {
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_NORMS = {"self_attention/layer_norm": "self_attn_layer_norm", "ffn/layer_norm": "final_layer_norm"}


def read_encoder(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the encoder's sizes, as Whisper's config.json names them, and its tensors under Hugging Face's names.

    Raises:
        CordError: the file is no Whisper of CTranslate2's, damaged, or quantised.
    """
    stored = _variables(path)
    if quantised := next((tensor for tensor in stored.values() if tensor.dtype not in _DTYPES.values()), None):
        raise CordError(
            f"{path}: {quantised.name} is quantised; convert the Whisper with --quantization float16 or float32"
        )
    try:
        width, mels, _ = stored["conv1/weight"].shape
        positions = stored["position_encodings/encodings"]
        tensors = {"embed_positions.weight": positions}
        for name in ("conv1", "conv2"):
            tensors |= {f"{name}.{part}": stored[f"{name}/{part}"] for part in ("weight", "bias")}
        tensors |= _norm(stored, "layer_norm", "layer_norm")
        count = 0
        while f"layer_{count}/ffn/linear_0/weight" in stored:
            tensors |= _layer(stored, f"layer_{count}/", f"layers.{count}.")
            count += 1
        config = {
            "model_type": "whisper",
            "d_model": width,
            "encoder_layers": count,
            "encoder_attention_heads": width // _HEAD_SIZE,
            "encoder_ffn_dim": stored["layer_0/ffn/linear_0/weight"].shape[0],
            "num_mel_bins": mels,
            "max_source_positions": positions.shape[0],
            "activation_function": "gelu",
            "scale_embedding": False,
        }
    except (KeyError, ValueError) as error:
        raise CordError(f"{path} is no Whisper (it lacks encoder/{error}); give a Whisper's directory") from None
    return config, tensors


def _layer(stored: dict[str, StoredTensor], source: str, target: str) -> dict[str, StoredTensor]:
    """Return the tensors of a layer."""
    tensors = {}
    fused = [stored[f"{source}self_attention/linear_0/{part}"] for part in ("weight", "bias")]
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight, bias = (_third(tensor, index) for tensor in fused)
        tensors[f"{target}self_attn.{name}.weight"] = weight
        if name != "k_proj":  # whose bias is zero
            tensors[f"{target}self_attn.{name}.bias"] = bias
    for name, own in _LINEARS.items():
        tensors |= {f"{target}{own}.{part}": stored[f"{source}{name}/{part}"] for part in ("weight", "bias")}
    for name, own in _NORMS.items():
        tensors |= _norm(stored, f"{source}{name}", f"{target}{own}")
    return tensors


def _norm(stored: dict[str, StoredTensor], source: str, target: str) -> dict[str, StoredTensor]:
    return {f"{target}.weight": stored[f"{source}/gamma"], f"{target}.bias": stored[f"{source}/beta"]}


def _third(tensor: StoredTensor, index: int) -> StoredTensor:
    """Return one of three equal parts of the rows, as a tensor of its own."""
    rows = tensor.shape[0] // 3
    offset = tensor.offset + index * (tensor.nbytes // 3)
    return StoredTensor(tensor.name, tensor.dtype, (rows, *tensor.shape[1:]), tensor.path, offset)


def _variables(path: Path) -> dict[str, StoredTensor]:
    """Return the encoder's matrices and vectors by CTranslate2's name within it."""
    tensors = {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if (version := _number(file, "I")) < _OLDEST_VERSION:
                raise CordError(f"{path} has version {version} of the format; convert the Whisper again")
            _string(file)
            _number(file, "I")
            for _ in range(_number(file, "I")):
                name = _string(file)
                shape = tuple(_number(file, "I") for _ in range(_number(file, "B")))
                dtype, nbytes = _DTYPES.get(_number(file, "B"), torch.int8), _number(file, "I")
                offset = file.tell()
                if offset + nbytes > size:
                    raise CordError(f"{path} is damaged (it ends within {name}); download it again")
                file.seek(nbytes, os.SEEK_CUR)
                if name.startswith(_ENCODER) and shape:  # what has none is a setting
                    own = name.removeprefix(_ENCODER)
                    tensors[own] = StoredTensor(name, dtype, shape, path, offset)
    except (struct.error, UnicodeDecodeError) as error:
        raise CordError(f"{path} is no model of CTranslate2 ({error}); give a Whisper's directory") from None
    return tensors


def _number(file: BinaryIO, kind: str) -> int:
    """Read an unsigned number, B or H or I, of the file's byte order."""
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()
