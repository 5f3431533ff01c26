"""Checkpoint directories: shards are read in full; what is truncated, missing or pickled is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_cord.convert import read_tensors
from megatron_cord.errors import CordError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(directory: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": torch.arange(6.0)}, directory / FIRST)
    save_file({"b": torch.ones(2, 3), "c": torch.zeros(1)}, directory / SECOND)
    index = {"metadata": {}, "weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def error(directory: Path) -> str:
    with pytest.raises(CordError) as caught:
        list(read_tensors(directory))
    return str(caught.value)


def test_shards_are_read_by_the_index(tmp_path: Path) -> None:
    """Catches a shard that is read twice or not at all, and a file that is no part of the checkpoint."""
    save_file({"stray": torch.zeros(1)}, sharded(tmp_path) / "adapter.safetensors")
    given = list(read_tensors(tmp_path))
    assert [name for name, _ in given] == ["a", "b", "c"] and torch.equal(given[0][1], torch.arange(6.0))


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_truncated(tmp_path: Path, kept: int) -> None:
    """Catches a file truncated in length, header or data that ends in a traceback, or is read as if it were whole."""
    save_file({"a": torch.arange(6.0)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert error(tmp_path).startswith(f"{path} is damaged (") and error(tmp_path).endswith("download it again")


def test_not_safetensors(tmp_path: Path) -> None:
    """Catches a traceback for a file of another format, such as the text that a large-file pointer holds."""
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is damaged" in error(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    """Catches weights that are unpickled, and a refusal without a way out."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    said = error(tmp_path)
    assert said.startswith(f"{tmp_path} has no .safetensors file, and pytorch_model.bin may execute code when read; ")
    assert f".save_pretrained('{tmp_path}-safetensors')" in said


def test_nothing_there(tmp_path: Path) -> None:
    """Catches an empty or missing directory that passes for a checkpoint without tensors."""
    assert error(tmp_path) == f"{tmp_path} has no .safetensors file"
    assert error(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'} does not exist; ")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """Catches a download that lost a shard and is reported as missing tensors, or not at all."""
    (sharded(tmp_path) / SECOND).unlink()
    assert (
        "names files that are not there" in error(tmp_path)
        and SECOND in error(tmp_path)
        and FIRST not in error(tmp_path)
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    """Catches a traceback of JSON where the user needs the index's name."""
    index = sharded(tmp_path) / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    assert error(tmp_path).startswith(f"{index} is damaged (")
