"""The order of samples: every sample once an epoch, the same on every layout, known from the step alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.data.config import DataConfig, TrainingSetConfig
from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.ordering.damage import DamageLimitError
from megatron_cord.data.ordering.row import Address
from megatron_cord.data.samples import PreparedSample, Sample
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig
from tests.data.ordering.sets import Listed, row_of

REQUIRED = ["output_dir=o", "model.checkpoint=c"]
ROOT = Path(__file__).resolve().parents[2]

SAMPLES = [Sample(id=str(number), question="q", waveform=np.zeros(1, np.float32)) for number in range(10)]


def loader(batch_size: int = 4, seed: int = 1, rank: int = 0, world: int = 1) -> SampleLoader:
    return SampleLoader(row_of(SAMPLES, seed), batch_size=batch_size, rank=rank, world=world)


def indices(source: SampleLoader, step: int) -> list[int]:
    return [address.number for address in source.addresses(step)]


def stream(source: SampleLoader, steps: int) -> list[int]:
    return [index for step in range(steps) for index in indices(source, step)]


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
        assert [order[position] for position in range(4)] == indices(loader(), step)
        assert all(len(part.samples) in (4 // world, 4 // world + 1) and part.step == step for part in parts)


def test_a_resumed_run_continues_the_same_row() -> None:
    """Would catch an order that depends on what was asked before."""
    whole = loader()
    expected = [indices(whole, step) for step in range(9)]
    resumed = loader()
    assert [indices(resumed, step) for step in range(5, 9)] == expected[5:]
    assert indices(resumed, 0) == expected[0]


def test_seeds_and_shuffle() -> None:
    """Would catch a seed that is ignored."""
    assert stream(loader(), 3) != stream(loader(seed=2), 3)
    assert stream(SampleLoader(row_of(SAMPLES, shuffle=False), batch_size=4), 3) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_batches_larger_than_an_epoch() -> None:
    """Would catch an index out of range with tiny sets."""
    assert sorted(indices(loader(batch_size=20), 0)) == sorted(list(range(10)) * 2)


def test_batch_and_epoch() -> None:
    """Would catch a batch that is not made of its indices, and a wrong count of epochs."""
    source = loader()
    assert [int(prepared.sample.id) for prepared in source.batch(2).samples] == indices(source, 2)
    assert source.row.epochs(source.position(5)) == {"": 2.0} and source.batch_size == 4


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batches_of_nothing_are_refused(batch_size: int) -> None:
    """Would catch a run that trains on nothing for ever."""
    with pytest.raises(CordError, match=f"a batch of {batch_size} samples"):
        loader(batch_size=batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_a_share(workers: int) -> None:
    """Would catch a rank that fails, or takes another's samples, where there are more ranks than samples."""
    source = SampleLoader(row_of(SAMPLES), batch_size=2, rank=2, world=3, workers=workers)
    assert source.batch(0).samples == source.batch(1).samples == () and source.addresses(0)
    source.close()


def write_set(directory: Path, count: int, shard_size: int) -> str:
    writer = ShardWriter(directory, shard_size=shard_size)
    rng = np.random.default_rng(count)
    for number in range(count):
        writer.write(Sample(f"s{number}", "what", (0.1 * rng.standard_normal(2000)).clip(-1, 1).astype(np.float32)))
    writer.close()
    return str(directory)


def test_killed_and_resumed_with_other_workers(tmp_path: Path) -> None:
    """Would catch an order, an augmentation or a share of the ranks that depends on workers.

    Also on what was read before a kill.
    """
    shards = write_set(tmp_path / "shards", 40, 7)
    row = killed_and_resumed(tmp_path, shards, steps=20)
    for epoch in (row[:40], row[40:]):
        assert sorted(epoch) == sorted(f"s{number}" for number in range(40))


def test_three_weighted_sets_killed_and_resumed(tmp_path: Path) -> None:
    """Would catch a sample that comes more or less often than its set's weight says.

    With an index of all samples, with shards as they are needed, and with copies of shards behind an address; after a
    kill, with other workers and ranks, too.
    """
    sizes, weights = {"a": 16, "stream": 11, "streamed-copies": 9}, {"a": 3, "stream": 2, "streamed-copies": 1}
    paths = {name: write_set(tmp_path / name, size, 3) for name, size in sizes.items()}
    paths["streamed-copies"] = f"file://{paths['streamed-copies']}"
    sets = {name: {"path": paths[name], "weight": weight} for name, weight in weights.items()}
    row = killed_and_resumed(tmp_path, json.dumps(sets), steps=30)
    assert Counter(name.partition("/")[0] for name in row) == {"a": 60, "stream": 40, "streamed-copies": 20}
    for name, size in sizes.items():
        taken = [sample for sample in row if sample.startswith(f"{name}/")]
        for start in range(0, len(taken), size):
            epoch = taken[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= {f"{name}/s{number}" for number in range(size)}
        assert len({tuple(taken[start : start + size]) for start in range(0, 2 * size, size)}) == 2


def killed_and_resumed(tmp_path: Path, sets: str, steps: int) -> list[str]:
    """Return the ids of a row, after it was read whole, and by processes that were killed and went on in other shares.

    All of them must have read the same audio at the same steps.
    """

    def start(name: str, first: int, last: int, workers: int, rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "tests/data/read_steps.py",
            sets,
            *map(str, (first, last, workers, rank, world)),
        ]
        return subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def lines(name: str) -> list[str]:
        path = tmp_path / name
        return path.read_text().splitlines() if path.exists() else []

    whole, killed = start("whole", 0, steps, 0), start("killed", 0, 100000, 3)
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
    shares = [start(f"share{rank}", done, steps, workers, rank, 2) for rank, workers in ((0, 1), (1, 2))]
    assert [process.wait() for process in shares] == [0, 0]
    parts = [lines("share0"), lines("share1")]
    resumed = [line for number in range(2 * (steps - done)) for line in (parts[0][number], parts[1][number])]
    assert expected[: 4 * done] + resumed == expected
    return [line.split()[1] for line in expected]


class _Slow(Listed):
    """Notes when it is read, and by whom."""

    def __init__(self) -> None:
        super().__init__(SAMPLES)
        self.read: list[tuple[int, str]] = []

    def __getitem__(self, index: int) -> Sample:
        self.read.append((index, threading.current_thread().name))
        return SAMPLES[index]


def test_workers_read_ahead_and_each_sample_once() -> None:
    """Would catch workers that read nothing ahead, or what nobody asked for.

    Also work on a sample that is done in the caller's thread.
    """
    source = _Slow()
    prepared: list[str] = []

    def prepare(samples: Sequence[Sample], step: int) -> list[PreparedSample]:
        prepared.extend(s.id for s in samples)
        return [PreparedSample(s, {}) for s in samples]

    ahead = SampleLoader(row_of(source), batch_size=4, workers=2, prepare=prepare)
    read_now = [[int(p.sample.id) for p in ahead.batch(step).samples] for step in (3, 4)]
    assert read_now == [indices(loader(), 3), indices(loader(), 4)]
    ahead.close()
    asked = indices(loader(), 3) + indices(loader(), 4) + indices(loader(), 5)
    read = [index for index, _ in source.read]
    assert set(asked[:8]) <= set(read) <= set(asked) and len(read) <= len(asked) and len(prepared) == len(read)
    assert all(name.startswith("loader") for _, name in source.read)


def test_a_sample_that_cannot_be_read_is_named_where_it_is_asked_for() -> None:
    """Would catch a worker that dies in silence, and a run that waits for it."""

    def fail(samples: Sequence[Sample], step: int) -> list[PreparedSample]:
        raise CordError(f"sample {samples[0].id} is broken")

    broken = SampleLoader(row_of(SAMPLES), batch_size=4, workers=2, prepare=fail)
    with pytest.raises(CordError, match=f"sample {indices(loader(), 0)[0]} is broken"):
        broken.batch(0)
    broken.close()


class Ranks:
    """Loaders of several ranks, each in a thread of its own, that exchange what they have found."""

    def __init__(self, sets: Sequence[Listed], max_skipped: float, **options: Any) -> None:
        self._barrier, self._said = threading.Barrier(len(sets)), dict[int, Any]()
        self.loaders = [
            SampleLoader(
                row_of(each, max_skipped=max_skipped), batch_size=4, rank=rank, world=len(sets),
                agree=partial(self._agree, rank), **options,
            )
            for rank, each in enumerate(sets)
        ]  # fmt: skip
        self._pool = ThreadPoolExecutor(len(sets))

    def _agree(self, rank: int, value: Any) -> list[Any]:
        self._said[rank] = value
        self._barrier.wait(30)
        everywhere = [self._said[number] for number in range(len(self.loaders))]
        self._barrier.wait(30)
        return everywhere

    def batch(self, step: int) -> list[int]:
        """Return the numbers of the step's samples by position."""
        shares = list(self._pool.map(lambda loader: loader.batch(step), self.loaders))
        found = {position: int(share.at(position).sample.id) for share in shares for position in share.positions}
        return [found[position] for position in sorted(found)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_damage_that_one_rank_finds_is_known_to_all(workers: int, world: int) -> None:
    """Would catch ranks with different samples at a step, and a row that depends on their number or on workers.

    Also a read-ahead with what was known before, and damage that counts before its step.
    """
    sets = [Listed(SAMPLES) for _ in range(world)]
    ranks, alone = Ranks(sets, 0.5, workers=workers), Ranks([Listed(SAMPLES)], 0.5)
    plan = [ranks.batch(step) for step in range(3)]
    assert plan == [alone.batch(step) for step in range(3)]
    for each in sets[:1]:  # the others still can read it
        each.broken = {2, 7}
    alone.loaders[0].row.sets[""].broken = {2, 7}  # type: ignore[attr-defined]
    later = [ranks.batch(step) for step in range(4, 12)]
    states = [loader.row.damage.state() for loader in ranks.loaders]
    assert all(state == states[0] for state in states) and states[0]
    assert all(not {2, 7} & set(batch) for batch in later[4:])
    if world == 1:
        assert later == [alone.batch(step) for step in range(4, 12)]
    steps = [step for step, _ in ranks.loaders[0].row.damage.found]
    assert steps == sorted(steps) and steps[0] >= 4
    for loader in ranks.loaders:
        loader.close()


def test_too_much_damage_stops_all_ranks_together() -> None:
    """Would catch a rank that goes on and waits for one that has left."""
    sets = [Listed(SAMPLES) for _ in range(2)]
    ranks = Ranks(sets, 0.0)
    ranks.batch(0)
    sets[1].broken = set(range(10))
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(loader.batch, 1) for loader in ranks.loaders]
        errors = [job.exception(60) for job in begun]
    assert [type(error) for error in errors] == [DamageLimitError] * 2 and str(errors[0]) == str(errors[1])
    assert "is broken" in str(errors[0])


def test_texts_of_many_steps() -> None:
    """Would catch a text that is read twice or for nobody, and damaged samples for which the teacher answers."""
    one = _Slow()
    source = SampleLoader(row_of(one, max_skipped=0.5), batch_size=4)
    texts = source.texts(range(5), 2)
    assert [number for number, _ in one.read] == sorted({n for step in range(5) for n in indices(source, step)[:2]})
    assert {address.number for address in texts} == {number for number, _ in one.read}
    broken = Listed(SAMPLES)
    broken.broken = {indices(source, 3)[1]}
    other = SampleLoader(row_of(broken, max_skipped=0.5), batch_size=4)
    read = other.texts(range(5), 2)
    assert set(read) == {address for step in range(5) for address in other.addresses(step)[:2]}
    assert not broken.broken & {address.number for address in read}


def test_texts_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a start that works out all samples of all steps for the few whose texts are read."""
    source, asked = loader(batch_size=400), list[int]()
    at = source.row.at

    def noted(position: int, batch_size: int) -> Address:
        asked.append(position)
        return at(position, batch_size)

    monkeypatch.setattr(source.row, "at", noted)
    source.texts(range(2), 3)
    assert asked == [0, 1, 2, 400, 401, 402]


def test_what_may_be_skipped_is_said() -> None:
    """Would catch samples that vanish because they are long, without a bound on how many."""
    with pytest.raises(CordError, match=r"data\.long_audio=skip .* data\.max_skipped"):
        DataConfig("a", "b", long_audio="skip")
    with pytest.raises(CordError, match=r"data\.max_skipped is a share"):
        DataConfig("a", "b", max_skipped=1.0)
    with pytest.raises(CordError, match=r"data\.workers"):
        DataConfig("a", "b", workers=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("a.path=x", "a.weight=0"), r"data\.train\.a: weight is 0; give a number above 0, or leave the set out"),
        (("a.path=x", "a.weight=-1.5"), r"data\.train\.a: weight is -1\.5"),
        (("a.path=x", "b.path=./x/"), r"data\.train: a and b are the same set, x; give it once"),
        (("a.weight=2",), r"data\.train\.a\.path is required"),
        (("a/b.path=x",), r"the name 'a/b' goes before samples' ids"),
        (
            ("a.path=x", "a.wieght=1"),
            r"unknown key 'data\.train\.a\.wieght'.*; did you mean 'data\.train\.NAME\.weight'",
        ),
        (("a.path=x", "a.weight=two"), r"data\.train\.a\.weight: expected float, got 'two'"),
    ],
)
def test_sets_that_cannot_be_meant(settings: tuple[str, ...], message: str) -> None:
    """Would catch a set that is never or always drawn, one that counts twice, and a name without a path."""
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, [*REQUIRED, *(f"data.train.{setting}" for setting in settings)])


def test_waiting_for_a_shard_is_no_hang() -> None:
    """Would catch a watchdog that ends a run which waits for a busy server, and one that ends runs on local shards."""
    with pytest.raises(CordError, match=r"data\.fetch_seconds=500 must be shorter than train\.watchdog_seconds=480"):
        load_config(RunConfig, None, [*REQUIRED, "data.train=https://x/y", "data.fetch_seconds=500"])
    assert load_config(RunConfig, None, [*REQUIRED, "data.train=x/y", "data.fetch_seconds=500"])


def test_one_set_or_several_whatever_comes_last(tmp_path: Path) -> None:
    """Would catch sets of a file that stay when a path is given on the command line, and the other way round."""
    several = load_config(RunConfig, None, [*REQUIRED, "data.train=x", "data.train.a.path=y", "data.train.a.weight=2"])
    assert several.data.training_sets == {"a": TrainingSetConfig("y", 2.0)}
    one = load_config(RunConfig, None, [*REQUIRED, "data.train.a.path=y", "data.train=x"])
    assert one.data.training_sets == {"": TrainingSetConfig("x")}
    path = tmp_path / "config.yaml"
    dump_config(several, path)
    assert load_config(RunConfig, path).data == several.data
