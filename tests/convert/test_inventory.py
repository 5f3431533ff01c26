"""Headers that fit a model and headers that do not; tests/cli/test_convert.py covers the published models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_cord.convert import export_tensors, read_into
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.inventory import common_dtype, fake_model
from megatron_cord.convert.loading import find_sources
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.model.reference import build, save


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path, build(tied=False))
    return tmp_path


def test_headers_that_fit(layout: Layout, checkpoint: Path) -> None:
    """Catches a whole checkpoint that is refused, and reading by rows that loses or changes a tensor."""
    arch, stored = load_architecture(checkpoint), stored_tensors(checkpoint)
    find_sources(fake_model(arch, layout), stored)
    model = LALM(arch, layout, common_dtype(stored))
    read_into(model, checkpoint)
    given = dict(export_tensors(model))
    assert given.keys() == {tensor.name for tensor in stored}
    assert all(torch.equal(given[tensor.name], tensor.read()) for tensor in stored)


def test_headers_that_do_not_fit(layout: Layout, checkpoint: Path) -> None:
    """Catches a check that stops at the first problem, or that reads weights before it finds one."""
    stored = stored_tensors(checkpoint)
    head = next(tensor for tensor in stored if tensor.name == "language_model.lm_head.weight")
    (checkpoint / "model.safetensors").unlink()
    others = [tensor for tensor in stored if tensor not in (head, stored[0], stored[1])]
    misfits = [replace(head, shape=(7, 48)), replace(stored[0], name=f"{stored[0].name}s"), others[0]]
    with pytest.raises(CordError) as caught:
        find_sources(fake_model(load_architecture(checkpoint), layout), [*others, *misfits])
    for words in (
        "tensor language_model.lm_head.weight has shape [7, 48], expected [101, 48]",
        f"unexpected tensor {stored[0].name}s (nearest expected: {stored[0].name})",
        f"tensor {others[0].name} occurs twice",
        f"missing tensor {stored[0].name}",
        f"missing tensor {stored[1].name}",
    ):
        assert words in str(caught.value)


def test_precisions(tmp_path: Path) -> None:
    """Catches a mixture that is rounded without a word, and integers that pass for weights."""
    mixed: dict[str, Tensor] = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(mixed, tmp_path / "model.safetensors")
    with pytest.raises(CordError, match="mixes tensors of bfloat16, float32; choose one with --dtype"):
        common_dtype(stored_tensors(tmp_path))
    save_file({"q": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CordError, match="tensor q is of type I8"):
        stored_tensors(tmp_path)
