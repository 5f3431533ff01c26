"""Sets that are read shard by shard: the samples of an index, few indexes at a time, damage when it is met."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.data.ordering.damage import DamagedError
from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.shards.cache import ShardCache
from megatron_cord.data.shards.entries import index_shard
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.streaming import StreamedShards, StreamLimits
from megatron_cord.errors import CordError
from tests.tiny_run import make_samples, write_shards

SALVAGE = StreamLimits(salvage=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Ten samples in four shards of three."""
    return write_shards(tmp_path / "set", make_samples(10, seed=1))


def cache_of(directory: Path, limit: int = 10**9) -> ShardCache:
    return ShardCache(directory.parent / "cache", limit, 0.0)


@pytest.mark.parametrize("remote", [False, True])
def test_the_samples_are_those_of_an_index(directory: Path, remote: bool) -> None:
    """Would catch another number, text or recording of a sample, and a copy that is not read."""
    path = f"file://{directory}" if remote else str(directory)
    stream, indexed = StreamedShards(path, window=2, cache=cache_of(directory)), ShardDataset(directory)
    assert len(stream) == len(indexed) == 10 and stream.counts == [3, 3, 3, 1]
    for number in [*range(10), 3, 0, 9]:
        one, other = stream[number], indexed[number]
        assert (one.id, one.question, one.answer, one.voice) == (other.id, other.question, other.answer, other.voice)
        assert np.array_equal(one.waveform, other.waveform) and one.id == stream.id_of(number)
        assert not len(stream.without_audio(number).waveform)
    assert len(list((directory.parent / "cache").glob("*.tar"))) == (4 if remote else 0)
    stream.close()


def test_few_indexes_are_kept_and_each_shard_is_indexed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an index of everything in memory, and threads that index the same shard at the same time."""
    made: list[str] = []

    def counted(path: Path, *rest: Any, **more: Any) -> Any:
        made.append(path.name)
        return index_shard(path, *rest, **more)

    monkeypatch.setattr("megatron_cord.data.shards.streaming.index_shard", counted)
    write_shards(directory.parent / "large", make_samples(60, seed=2))
    stream = StreamedShards(str(directory.parent / "large"), window=2)
    stream.expect([0, 1])
    threads = [threading.Thread(target=lambda: [stream[number] for number in range(6)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["shard-000000.tar", "shard-000001.tar"]
    for number in range(60):
        stream[number]
    assert len(made) == 20 and len(stream._indexes) == 2 * 2 + 2
    stream.close()


def test_a_copy_that_was_removed_is_made_again(directory: Path) -> None:
    """Would catch a run that ends because another one needed the room."""
    stream = StreamedShards(f"file://{directory}", window=1, cache=cache_of(directory))
    first = stream[0].waveform
    for path in (directory.parent / "cache").glob("*.tar"):
        path.unlink()
    assert np.array_equal(stream[0].waveform, first)
    stream.close()


def test_a_disk_without_room_is_no_damage_of_the_data(directory: Path, tmp_path: Path) -> None:
    """Would catch samples that are left out because of the node that should read them."""
    (tmp_path / "file").write_text("")
    stream = StreamedShards(f"file://{directory}", window=1, cache=ShardCache(tmp_path / "file" / "x", 10**9, 0.0))
    with pytest.raises(DamagedError, match=r"data\.cache_dir=.*/file/x cannot be written") as caught:
        stream[0]
    assert caught.value.fatal
    stream.close()


def damage_of(stream: StreamedShards, number: int) -> tuple[int, int, str]:
    with pytest.raises(DamagedError) as caught:
        stream[number]
    return caught.value.first, caught.value.last, str(caught.value)


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_is_gone_takes_all_its_samples_along(directory: Path, remote: bool) -> None:
    """Would catch a missing shard that counts as one sample, whether it was indexed before or not."""
    stream = StreamedShards(f"file://{directory}" if remote else str(directory), window=1, cache=cache_of(directory))
    assert stream[3].id == "s1-3"
    for number in (1, 2):
        (directory / f"shard-{number:06d}.tar").unlink()
    if not remote:
        first, last, message = damage_of(stream, 4)
        assert (first, last) == (3, 6) and "shard-000001.tar is missing" in message
    first, last, message = damage_of(stream, 7)
    assert (first, last) == (6, 9) and "shard-000002.tar" in message
    stream.close()


def test_damage_inside_a_shard(directory: Path) -> None:
    """Would catch numbers that shift behind a damaged sample, and a truncated shard of which nothing is taken.

    Also one that is taken though nothing may be skipped.
    """
    indexed = ShardDataset(directory)
    shard = directory / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b'"question"', content.index(b"s1-1.json"))
    content[at : at + 10] = b'"quest?on"'
    shard.write_bytes(content)
    stream = StreamedShards(str(directory), window=1)
    assert damage_of(stream, 1)[:2] == (1, 2) and stream[2].id == indexed.id_of(2) and stream[0].id == "s1-0"
    cut = directory / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    first, last, message = damage_of(stream, 3)
    assert (first, last) == (3, 6) and "bytes: truncated or changed" in message
    stream.close()
    salvaging = StreamedShards(str(directory), window=1, limits=SALVAGE)
    assert salvaging[3].id == "s1-3"
    first, last, message = damage_of(salvaging, 5)
    assert last == 6 and 4 <= first <= 5 and "shard-000001.tar is truncated" in message
    assert salvaging[6].id == "s1-6"
    salvaging.close()


def test_samples_outside_the_limits(directory: Path) -> None:
    """Would catch prompts that cannot be made, and long audio that is skipped where it shall stop the run."""
    lengths = [len(ShardDataset(directory)[number].waveform) for number in range(10)]
    longest = sorted(lengths)[7]
    number = max(range(10), key=lambda n: lengths[n])
    skipping = StreamedShards(str(directory), window=1, limits=StreamLimits(PromptLimits(longest=longest)))
    assert damage_of(skipping, number)[:2] == (number, number + 1)
    refusing = StreamedShards(str(directory), window=1, limits=StreamLimits(longest=longest))
    with pytest.raises(DamagedError, match=r"s of audio, the encoder's window is .* data\.long_audio") as caught:
        refusing[number]
    assert caught.value.fatal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x.tar"}, r"the shard '\.\./x\.tar' is no plain file name"),
        ({"sha256": "../../x"}, "is no SHA-256"),
        ({"samples": 0}, "holds no samples"),
    ],
)
def test_manifests_that_cannot_be_meant(directory: Path, change: dict[str, Any], message: str) -> None:
    """Would catch a manifest from elsewhere that leads out of the directory, and an empty set."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"] = [content["shards"][0] | change]
    path.write_text(json.dumps(content))
    with pytest.raises(CordError, match=message):
        StreamedShards(f"file://{directory}", window=1, cache=cache_of(directory))


def test_paths_without_a_manifest(directory: Path, tmp_path: Path) -> None:
    """Would catch a traceback where shards are read as a stream that no manifest lists."""
    with pytest.raises(CordError, match=r"\*\.tar is no directory with a manifest, which data\.stream needs"):
        StreamedShards(f"{directory}/*.tar", window=1)
    with pytest.raises(CordError, match=r"nothing/manifest\.json: it is not there; give the address of a directory"):
        StreamedShards(f"file://{tmp_path}/nothing", window=1, cache=cache_of(directory))
