"""Settings of every test, made before torch is imported: one thread, as two cores may run several ranks; no network."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import atexit
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_cord.runtime import entry
from megatron_cord.runtime.log import configure_logging

TESTS = Path(__file__).parent

torch.set_num_threads(1)
configure_logging("info", rank=0)  # log lines are written to standard error, as in a process of its own

#: Folders and files whose tests start ranks or whole runs, or wait for processes that end: minutes, with which the
#: workers begin. At the end one that waits would leave the processor idle.
LONG = (
    *("trainer", "verify", "pretend_gpu", "transformer_engine", "convert", "model", "evaluation"),
    *("runtime", "warmup", "test_imports.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders that take long first, so that parallel workers, which take a file at a time, end together."""
    places = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).parts[0], len(LONG)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the tests' modules have imported: it stays until the end."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries that count what is left at the end would report leaks


@pytest.fixture(autouse=True)
def _entry_points_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let entry points that a test calls in this process raise SystemExit; they would end it otherwise."""
    monkeypatch.setattr(entry, "end", sys.exit)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Make this process the only rank of a trainer."""
    # Not above: most tests do without Megatron-Core, whose import takes seconds.
    from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize

    initialize(ParallelConfig(), seed=0)
    yield
    finalize()
