"""The order of samples: every sample once an epoch, the same on every layout, known from the step alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.loader import DataConfig, SampleLoader
from megatron_cord.data.samples import PreparedSample, Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_same_global_batch_on_every_layout(world: int) -> None:
    """Would catch runs that see other data when the number of ranks changes.

    Also ranks that read more than their share, and remainders lost.
    """
    for step in range(7):
        parts = [loader(rank=rank, world=world).batch(step) for rank in range(world)]
        assert sorted(position for part in parts for position in part.positions) == [0, 1, 2, 3]
        order = {p: int(part.at(p).sample.id) for part in parts for p in part.positions}
        assert [order[position] for position in range(4)] == loader().indices(step)
        assert all(len(part.samples) in (4 // world, 4 // world + 1) and part.step == step for part in parts)


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
    assert [int(prepared.sample.id) for prepared in source.batch(2).samples] == source.indices(2)
    assert source.epoch(5) == 2.0 and source.batch_size == 4


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batches_of_nothing_are_refused(batch_size: int) -> None:
    """Would catch a run that trains on nothing for ever."""
    with pytest.raises(CordError, match=f"a batch of {batch_size} samples"):
        loader(batch_size=batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_a_share(workers: int) -> None:
    """Would catch a rank that fails, or takes another's samples, where there are more ranks than samples."""
    source = SampleLoader(SAMPLES, batch_size=2, seed=1, rank=2, world=3, workers=workers)
    assert source.batch(0).samples == source.batch(1).samples == () and source.indices(0)
    source.close()


def test_empty_sources_are_refused() -> None:
    """Would catch a division by zero at the first step."""
    with pytest.raises(CordError, match="no samples"):
        SampleLoader([], batch_size=1, seed=0)


def test_killed_and_resumed_with_other_workers(tmp_path: Path) -> None:
    """Would catch an order, an augmentation or a share of the ranks that depends on workers.

    Also on what was read before a kill.
    """
    writer = ShardWriter(tmp_path / "shards", shard_size=7)
    rng = np.random.default_rng(0)
    for number in range(40):
        writer.write(Sample(f"s{number}", "what", (0.1 * rng.standard_normal(2000)).clip(-1, 1).astype(np.float32)))
    writer.close()

    def start(name: str, first: int, last: int, workers: int, rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "tests/data/read_steps.py",
            str(tmp_path / "shards"),
            *map(str, (first, last, workers, rank, world)),
        ]
        return subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def lines(name: str) -> list[str]:
        path = tmp_path / name
        return path.read_text().splitlines() if path.exists() else []

    whole, killed = start("whole", 0, 20, 0), start("killed", 0, 100000, 3)
    deadline = time.monotonic() + 120
    while len(lines("killed")) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and whole.wait() == 0
    expected = lines("whole")
    done = min(
        len(lines("killed")) // 4, 10
    )  # steps that the killed one had finished; a checkpoint of step 10 at the latest
    assert lines("killed")[: 4 * done] == expected[: 4 * done] and done >= 5
    shares = [start(f"share{rank}", done, 20, workers, rank, 2) for rank, workers in ((0, 1), (1, 2))]
    assert [process.wait() for process in shares] == [0, 0]
    parts = [lines("share0"), lines("share1")]
    resumed = [line for number in range(2 * (20 - done)) for line in (parts[0][number], parts[1][number])]
    assert expected[: 4 * done] + resumed == expected
    for epoch in (expected[:40], expected[40:]):
        assert sorted(line.split()[1] for line in epoch) == sorted(f"s{number}" for number in range(40))


class _Slow:
    """Notes when it is read, and by whom."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Sample:
        self.read.append((index, threading.current_thread().name))
        return SAMPLES[index]


def test_workers_read_ahead_and_each_sample_once() -> None:
    """Would catch workers that read nothing ahead, or what nobody asked for.

    Also work on a sample that is done in the caller's thread.
    """
    source = _Slow()
    prepared: list[str] = []

    def prepare(samples: Sequence[Sample]) -> list[PreparedSample]:
        prepared.extend(s.id for s in samples)
        return [PreparedSample(s, {}) for s in samples]

    ahead = SampleLoader(source, batch_size=4, seed=1, workers=2, prepare=prepare)
    read_now = [[int(p.sample.id) for p in ahead.batch(step).samples] for step in (3, 4)]
    assert read_now == [loader().indices(3), loader().indices(4)]
    ahead.close()
    asked = loader().indices(3) + loader().indices(4) + loader().indices(5)
    read = [index for index, _ in source.read]
    assert set(asked[:8]) <= set(read) <= set(asked) and len(read) <= len(asked) and len(prepared) == len(read)
    assert all(name.startswith("loader") for _, name in source.read)


def test_a_sample_that_cannot_be_read_is_named_where_it_is_asked_for() -> None:
    """Would catch a worker that dies in silence, and a run that waits for it."""

    def fail(samples: Sequence[Sample]) -> list[PreparedSample]:
        raise CordError(f"sample {samples[0].id} is broken")

    broken = SampleLoader(SAMPLES, batch_size=4, seed=1, workers=2, prepare=fail)
    with pytest.raises(CordError, match=f"sample {loader().indices(0)[0]} is broken"):
        broken.batch(0)
    broken.close()


def test_what_may_be_skipped_is_said() -> None:
    """Would catch samples that vanish because they are long, without a bound on how many."""
    with pytest.raises(CordError, match=r"data\.long_audio=skip .* data\.max_skipped"):
        DataConfig("a", "b", long_audio="skip")
    with pytest.raises(CordError, match=r"data\.max_skipped is a share"):
        DataConfig("a", "b", max_skipped=1.0)
    with pytest.raises(CordError, match=r"data\.workers"):
        DataConfig("a", "b", workers=-1)
