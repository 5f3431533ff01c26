"""The order of samples: every sample once an epoch, the same on every layout, known from the step alone."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError

SAMPLES = [Sample(id=str(number), question="q", waveform=np.zeros(1, np.float32)) for number in range(10)]


def loader(batch_size: int = 4, seed: int = 1, rank: int = 0, world: int = 1) -> SampleLoader:
    return SampleLoader(SAMPLES, batch_size=batch_size, seed=seed, rank=rank, world=world)


def stream(source: SampleLoader, steps: int) -> list[int]:
    return [index for step in range(steps) for index in source.indices(step)]


def test_every_sample_once_an_epoch() -> None:
    """Would catch samples left out or repeated where an epoch ends in the middle of a batch."""
    order = stream(loader(), 10)
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_global_batch_on_every_layout(world: int) -> None:
    """Would catch runs that see other data when the number of ranks changes."""
    for step in range(7):
        parts = [loader(rank=rank, world=world).indices(step) for rank in range(world)]
        assert [index for part in parts for index in part] == loader().indices(step)
        assert all(len(part) == 4 // world for part in parts)


def test_a_resumed_run_continues_the_same_row() -> None:
    """Would catch an order that depends on what was asked before."""
    whole = loader()
    expected = [whole.indices(step) for step in range(9)]
    resumed = loader()
    assert [resumed.indices(step) for step in range(5, 9)] == expected[5:]
    assert resumed.indices(0) == expected[0]


def test_seeds_and_shuffle() -> None:
    """Would catch a seed that is ignored."""
    assert stream(loader(), 3) != stream(loader(seed=2), 3)
    assert stream(SampleLoader(SAMPLES, batch_size=4, seed=1, shuffle=False), 3) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_batches_larger_than_an_epoch() -> None:
    """Would catch an index out of range with tiny sets."""
    assert sorted(loader(batch_size=20).indices(0)) == sorted(list(range(10)) * 2)


def test_batch_and_epoch() -> None:
    """Would catch a batch that is not made of its indices, and a wrong count of epochs."""
    source = loader()
    assert [int(sample.id) for sample in source.batch(2)] == source.indices(2)
    assert source.epoch(5) == 2.0 and source.batch_size == 4


@pytest.mark.parametrize(("batch_size", "world"), [(5, 2), (0, 1), (-4, 2)])
def test_batches_that_do_not_divide_are_refused(batch_size: int, world: int) -> None:
    """Would catch ranks with batches of different sizes."""
    with pytest.raises(CordError, match=f"a batch of {batch_size} samples"):
        loader(batch_size=batch_size, world=world)


def test_empty_sources_are_refused() -> None:
    """Would catch a division by zero at the first step."""
    with pytest.raises(CordError, match="no samples"):
        SampleLoader([], batch_size=1, seed=0)
