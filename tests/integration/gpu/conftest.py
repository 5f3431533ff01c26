"""Tests of `make test-gpu`: what only a CUDA device can tell. Without one each is skipped with that reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_run import write_inputs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip them before any of their fixtures is made."""
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`, `train` and `heldout`; tests only read them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
