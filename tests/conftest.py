"""Settings of every test, made before torch is imported: one thread (two cores may run several ranks), and no network."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Iterator

import pytest
import torch

from megatron_cord.runtime.log import configure_logging

torch.set_num_threads(1)
configure_logging("info", rank=0)  # log lines are written to standard error, as in a process of its own


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process as the only rank of a trainer."""
    # Not above: most tests do without Megatron-Core, whose import takes seconds.
    from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize

    initialize(ParallelConfig(), seed=0)
    yield
    finalize()
