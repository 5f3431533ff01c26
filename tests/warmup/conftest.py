"""A tiny grafted checkpoint with recordings, and the layout of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_cord.cli.main import cord, invoke
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.convert.graft.test_graft import write_llm, write_whisper
from tests.warmup.short_warmup import write_corpus


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm`, `whisper`, `grafted` and `data`."""
    root = tmp_path_factory.mktemp("inputs")
    sources = [str(write_llm(root / "llm")), str(write_whisper(root / "whisper"))]
    weights = load_file(root / "whisper" / "model.safetensors")
    for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
        weights[name] *= 10  # beside positions that are as large as in a trained one
    save_file(weights, root / "whisper" / "model.safetensors")
    assert invoke(cord, ["graft", *sources, str(root / "grafted"), "--hidden-size", "256"], "cord") == 0
    write_corpus(root / "data", 40)
    return root


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()
