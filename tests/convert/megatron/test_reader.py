"""Weights read from a Megatron checkpoint; whole checkpoints of all layouts are read in tests/cli/test_convert.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.inventory import fake_model
from megatron_cord.convert.loading import find_sources
from megatron_cord.convert.megatron import reader
from megatron_cord.convert.megatron.reader import SavedWeights
from megatron_cord.convert.megatron.writer import save_weights
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.model.reference import build, published_tensors, save
from tests.model.test_architecture import ARCHITECTURE

HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def model() -> Iterator[LALM]:
    yield fake_model(ARCHITECTURE, initialize(ParallelConfig(), seed=0), torch.float32)
    finalize()


@pytest.fixture(scope="module")
def checkpoint(model: LALM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(root / "source", build(tied=False))
    save_weights(
        root / "checkpoint",
        model,
        find_sources(model, stored_tensors(root / "source")),
        lambda at: None,
        lambda portion: None,
    )
    return root / "checkpoint"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def read(saved: SavedWeights) -> dict[str, Tensor]:
    """All tensors; portions share one buffer."""
    return {name: torch.cat([portion.clone() for portion in saved.blocks(name)]) for name in saved.shapes}


@pytest.mark.parametrize("block", [1, 4000, 1 << 25])
def test_tensors_come_in_portions(checkpoint: Path, model: LALM, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Catches a portion that begins within a head, the gate or the vocabulary and is taken from elsewhere."""
    monkeypatch.setattr(reader, "BLOCK", block)
    given, wanted = read(SavedWeights(checkpoint, model)), published_tensors(build(tied=False))
    assert given.keys() == wanted.keys() and all(torch.equal(given[name], tensor) for name, tensor in wanted.items())


def error(directory: Path, model: LALM) -> str:
    with pytest.raises(CordError) as caught:
        read(SavedWeights(directory, model))
    return str(caught.value)


def test_damaged_files_are_named(copy: Path, model: LALM) -> None:
    """Catches a traceback, or wrong weights, where a file is truncated, overwritten or gone."""
    (data,) = copy.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert f"{data} is damaged" in error(copy, model)
    data.write_bytes(bytes(len(content)))
    assert f"{data} is damaged" in error(copy, model)
    data.unlink()
    assert f"{data} is damaged (No such file or directory)" in error(copy, model)


def test_damaged_metadata_is_named(copy: Path, model: LALM) -> None:
    """Catches a traceback for a directory that is no checkpoint, or whose table of contents is damaged."""
    (copy / ".metadata").write_bytes(b"nothing")
    assert f"{copy} is not a whole checkpoint" in error(copy, model)
    (copy / ".metadata").unlink()
    assert f"{copy} is not a whole checkpoint" in error(copy, model)


class _Transposed(DefaultSavePlanner):
    """A planner of tensors whose elements lie in another order."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = super().resolve_data(write_item)
        return data.t().contiguous().t() if isinstance(data, Tensor) and data.dim() == 2 else data


def test_another_order_of_elements_is_refused(copy: Path, model: LALM) -> None:
    """Catches a tensor that is read as rows where its file has columns."""
    dtypes = {entry: torch.empty(shape) for entry, shape in _saved_shapes(copy).items()}
    shutil.rmtree(copy)
    save_distributed(dtypes, storage_writer=FileSystemWriter(copy), planner=_Transposed(flatten_state_dict=False))
    assert "it holds another tensor than its metadata describe" in error(copy, model)


def _saved_shapes(directory: Path) -> dict[str, torch.Size]:
    metadata = FileSystemReader(directory).read_metadata()
    return {key: saved.size for key, saved in metadata.state_dict_metadata.items() if hasattr(saved, "size")}


def test_mixed_precisions_ask_for_one(copy: Path, model: LALM) -> None:
    """Catches weights of two precisions that are exported as one of them, or that cannot be exported at all."""
    tensors = {key: torch.zeros(size) for key, size in _saved_shapes(copy).items()}
    tensors["language_model.output_layer.weight"] = tensors["language_model.output_layer.weight"].bfloat16() + 1
    shutil.rmtree(copy)
    save_distributed(tensors, storage_writer=FileSystemWriter(copy), no_dist=True)
    saved = SavedWeights(copy, model)
    with pytest.raises(CordError, match="holds weights of bfloat16, float32; choose a precision with --dtype"):
        saved.common_dtype()
    assert all(portion.dtype == torch.bfloat16 and bool((portion == 1).all()) for portion in saved.blocks(HEAD))
