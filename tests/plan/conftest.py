"""The small model's checkpoint, and the layout of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart.checkpoint import create_checkpoint
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.plan.small_model import SIZES


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Qwen2-Audio of these sizes."""
    path = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(path, SIZES, [f"word{i}" for i in range(83)], seed=0)
    return path


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Yield the layout of one rank."""
    yield initialize(ParallelConfig(), seed=0)
    finalize()
