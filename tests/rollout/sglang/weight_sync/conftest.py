"""A checkpoint whose weights are sent to servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weight_sync") / "checkpoint"
    create_checkpoint(directory, TinyModelConfig(), ["one", "two", "plus"], seed=0)
    return directory
