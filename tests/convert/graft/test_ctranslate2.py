"""`cord graft` with a Whisper of CTranslate2's, against the same Whisper in Hugging Face's files."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperModel

from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from tests.convert.graft.test_graft import WINDOW, graft, write_llm

Variables = dict[str, np.ndarray]


def build_whisper() -> Any:
    """Build a Whisper in 16 bits with heads of 64, as all have, and no weight or bias that is zero or one."""
    whisper: Any = WhisperModel
    torch.manual_seed(2)
    model = whisper(
        WhisperConfig(
            num_mel_bins=8, d_model=64, encoder_layers=2, encoder_attention_heads=1, encoder_ffn_dim=20,
            decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=12, max_source_positions=WINDOW,
            vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )
    ).half()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def variables_of(encoder: Any) -> Variables:
    """Return what CTranslate2's converter writes: one matrix of queries, keys and values, zeros for the keys' bias."""
    variables: Variables = {"encoder/num_heads": np.array(1, dtype=np.int16)}

    def add(name: str, **tensors: torch.Tensor) -> None:
        variables.update({f"encoder/{name}/{part}": tensor.detach().numpy() for part, tensor in tensors.items()})

    def linear(name: str, module: Any) -> None:
        add(name, weight=module.weight, bias=module.bias)

    def norm(name: str, module: Any) -> None:
        add(name, gamma=module.weight, beta=module.bias)

    linear("conv1", encoder.conv1)
    linear("conv2", encoder.conv2)
    add("position_encodings", encodings=encoder.embed_positions.weight)
    norm("layer_norm", encoder.layer_norm)
    for index, layer in enumerate(encoder.layers):
        name = f"layer_{index}"
        q, k, v = (getattr(layer.self_attn, part) for part in ("q_proj", "k_proj", "v_proj"))
        weight = torch.cat([q.weight, k.weight, v.weight])
        bias = torch.cat([q.bias, torch.zeros_like(q.bias), v.bias])
        add(f"{name}/self_attention/linear_0", weight=weight, bias=bias)
        linear(f"{name}/self_attention/linear_1", layer.self_attn.out_proj)
        norm(f"{name}/self_attention/layer_norm", layer.self_attn_layer_norm)
        linear(f"{name}/ffn/linear_0", layer.fc1)
        linear(f"{name}/ffn/linear_1", layer.fc2)
        norm(f"{name}/ffn/layer_norm", layer.final_layer_norm)
    return variables


def write(directory: Path, variables: Variables) -> Path:
    """Write model.bin."""
    codes = {"float16": 4, "int16": 2, "int8": 1}

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        content += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", codes[array.dtype.name], array.nbytes) + array.tobytes()
    directory.mkdir(exist_ok=True)
    (directory / "model.bin").write_bytes(content + struct.pack("<I", 0))
    return directory


def test_both_forms_of_a_whisper_give_the_same(tmp_path: Path) -> None:
    """Catches parts of a fused matrix in another order, a norm in another place, and a wrong size."""
    llm, model = write_llm(tmp_path / "llm"), build_whisper()
    model.save_pretrained(tmp_path / "published")
    write(tmp_path / "converted", variables_of(model.encoder))
    for name in ("published", "converted"):
        graft(llm, tmp_path / name, tmp_path / f"{name}-out", "--dtype", "float32")
    given, wanted = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("converted", "published"))
    assert given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)
    assert load_architecture(tmp_path / "converted-out") == load_architecture(tmp_path / "published-out")


def test_damage_is_one_line(tmp_path: Path) -> None:
    """Catches a file that is found to be damaged, or of another kind, while the result is written."""
    llm, variables = write_llm(tmp_path / "llm"), variables_of(build_whisper().encoder)
    converted, out = write(tmp_path / "converted", variables), tmp_path / "out"
    whole = (converted / "model.bin").read_bytes()
    quantised = variables | {"encoder/conv1/weight": variables["encoder/conv1/weight"].astype(np.int8)}
    int8 = (write(tmp_path / "int8", quantised) / "model.bin").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is damaged (it ends within encoder/"),
        (whole[:9], "is no model of CTranslate2"),
        (b"\3" + whole[1:], "has version 3 of the format"),
        (whole.replace(b"encoder/conv1", b"encoder/conv9"), "is no Whisper (it lacks encoder/'conv1/weight')"),
        (int8, "encoder/conv1/weight is quantised"),
    ):
        (converted / "model.bin").write_bytes(content)
        with pytest.raises(CordError) as caught:
            graft(llm, converted, out)
        assert message in str(caught.value) and "\n" not in str(caught.value) and not out.exists()
