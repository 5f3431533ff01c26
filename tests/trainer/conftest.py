"""Inputs that the trainer's tests share: a tiny checkpoint with shards, and a layout of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.tiny_run import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`, `train` and `heldout`; tests only read them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def prompts(inputs: Path) -> PromptBuilder:
    return PromptBuilder(inputs / "checkpoint")


@pytest.fixture
def layout() -> Iterator[Layout]:
    """One rank, alone."""
    yield initialize(ParallelConfig(), seed=0)
    finalize()
