"""Tensors of parts that are not trained: through import, export, runs and warm-ups, bit by bit."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cord.convert import read_tensors
from megatron_cord.convert.hf.carried import read_carried
from megatron_cord.model.families import FAMILIES, load_architecture
from tests.cli.test_convert import alone, error
from tests.tiny_run import write_checkpoint

#: Of a precision of its own each, and one without rows; NaN bits and infinities are nothing to change either.
OTHERS = {
    "talker.model.weight": torch.tensor([[float("nan"), float("inf")], [-0.0, 1e-40]]),
    "talker.scale": torch.tensor(3.5),
    "vocoder.filter": torch.arange(12, dtype=torch.float32).view(3, 4).bfloat16(),
    "vocoder.empty": torch.zeros(0, 4),
}
VOICES = b"no pickle that anything here could read"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint of a family that carries two parts and a file."""
    family = replace(FAMILIES["qwen2_audio"], carries=("talker.", "vocoder."), carries_files=("voices.pt",))
    monkeypatch.setitem(FAMILIES, "qwen2_audio", family)
    directory = write_checkpoint(tmp_path / "source")
    save_file(load_file(directory / "model.safetensors") | OTHERS, directory / "model.safetensors")
    (directory / "voices.pt").write_bytes(VOICES)
    (directory / "pytorch_model.bin").write_bytes(VOICES)
    return directory


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_carried(directory: Path, source: Path, *, cast: bool = False) -> None:
    """Raise unless a directory has all of the source's tensors; with cast, its model's in bfloat16."""
    given, wanted = dict(read_tensors(directory)), dict(read_tensors(source))
    for name, tensor in wanted.items():
        assert bits(given.pop(name)) == bits(tensor if name in OTHERS or not cast else tensor.bfloat16()), name
    assert not given
    assert (directory / "voices.pt").read_bytes() == VOICES
    assert not (directory / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_carried_tensors_come_back(source: Path, tmp_path: Path, dtype: str) -> None:
    """Catches a part that an import drops, a precision that is changed with the model's, and numbers left unsaid."""
    status, output = alone("import", source, tmp_path / "checkpoint", "--dtype", dtype)
    assert status == 0 and "4 carried unchanged (talker 2, vocoder 2)" in output
    # The import is whole: it is exported without its source.
    hidden = source.rename(tmp_path / "moved")
    status, output = alone("export", tmp_path / "checkpoint", tmp_path / "out", "--max-shard-size", "20KB")
    assert status == 0 and "4 carried unchanged (talker 2, vocoder 2)" in output
    assert_carried(tmp_path / "out", hidden, cast=dtype != "auto")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(read_tensors(hidden)).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in read_tensors(tmp_path / "out"))


def test_a_dry_run_lists_them(source: Path, tmp_path: Path) -> None:
    """Catches an inventory that hides what is passed on."""
    alone("import", source, tmp_path / "checkpoint")
    for command in (("import", source), ("export", tmp_path / "checkpoint")):
        status, output = alone(*command, tmp_path / "out", "--dry-run")
        assert status == 0 and not (tmp_path / "out").exists()
        assert "talker.model.weight\t2x2\t16\t-\tCarried" in output and "vocoder.filter\t3x4\t24\t-\tCarried" in output
        assert "talker, carried: 5 parameters" in output and "4 carried unchanged" in output


def test_other_tensors_are_still_refused(source: Path, tmp_path: Path) -> None:
    """Catches a name that is dropped because some names are passed on."""
    save_file({"talkers.model.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    tensors = load_file(source / "model.safetensors") | load_file(tmp_path / "more.safetensors")
    save_file(tensors, source / "model.safetensors")
    assert "unexpected tensor talkers.model.weight" in error("import", source, tmp_path / "checkpoint")


def test_a_family_without_such_parts_carries_nothing(tmp_path: Path) -> None:
    """Catches tensors that are passed on though nobody said so."""
    directory = write_checkpoint(tmp_path / "source")
    assert not read_carried(directory, load_architecture(directory)).tensors
    status, output = alone("import", directory, tmp_path / "checkpoint")
    assert status == 0 and "carried" not in output
