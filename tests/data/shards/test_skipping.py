"""Samples that cannot be used: skipped, counted and bounded by max_skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from tests.data.shards.shard_files import damaged_set, flac, sample, tar, text, wav, write


def test_damage_is_skipped_counted_and_bounded(tmp_path: Path) -> None:
    """Would catch a damaged sample that ends the run although it may be skipped, one that is not counted.

    Also a bound that does not hold.
    """
    directory = damaged_set(tmp_path / "set")
    with pytest.raises(CordError, match=r"shard-000000.tar has .* truncated or changed"):
        ShardDataset(directory)
    dataset = ShardDataset(directory, max_skipped=0.5)
    assert [dataset[i].id for i in range(len(dataset))] == ["a", "s-8", "s-4", "s-5", "s-9", "s-10", "s-11"]
    found = {item.message.removeprefix(f"{directory}/"): item.samples for item in dataset.skipped}
    assert sum(found.values()) == 5 and len(found) == 4
    for expected in (
        "sample b: audio is cut off",
        "sample c has no text",
        "shard-000001.tar is truncated",
        "sample s-8 is in",
    ):
        assert any(expected in message for message in found), expected
    assert next(count for message, count in found.items() if "truncated" in message) == 2
    with pytest.raises(
        CordError,
        match=r"5 of 12 samples cannot be used, more than max_skipped=0\.4 allows; the first: .*sample b: audio",
    ):
        ShardDataset(directory, max_skipped=0.4)


def test_what_is_skipped_depends_on_the_files_alone(tmp_path: Path) -> None:
    """Would catch ranks or restarts that train on other samples.

    Also a fingerprint that does not tell two sets apart.
    """
    directory = damaged_set(tmp_path / "set")
    first, second = ShardDataset(directory, max_skipped=0.5), ShardDataset(directory, max_skipped=0.9)
    assert first.skipped == second.skipped and first.fingerprint == second.fingerprint
    write(tmp_path / "whole", count=12, shard_size=4)
    assert ShardDataset(tmp_path / "whole").fingerprint != first.fingerprint
    assert ShardDataset(tmp_path / "whole").skipped == []


def test_missing_shards_and_wrong_checksums_count_whole(tmp_path: Path) -> None:
    """Would catch a shard whose audio was changed behind the manifest's back.

    Also a missing one that counts as one sample.
    """
    write(tmp_path, count=12, shard_size=4)
    shards = sorted(tmp_path.glob("*.tar"))
    content = bytearray(shards[0].read_bytes())
    place = content.index(b"RIFF") + 60
    content[place] ^= 1
    shards[0].write_bytes(content)
    assert len(ShardDataset(tmp_path)) == 12  # nothing but a checksum tells
    with pytest.raises(CordError, match=r"shard-000000.tar does not have the checksum"):
        ShardDataset(tmp_path, verify=True)
    shards[1].unlink()
    dataset = ShardDataset(tmp_path, max_skipped=0.7, verify=True)
    assert len(dataset) == 4 and [item.samples for item in dataset.skipped] == [4, 4]


def test_clips_of_ten_minutes_are_left_out(tmp_path: Path) -> None:
    """Would catch a clip that only fails when its turn comes, hours later."""
    writer = ShardWriter(tmp_path)
    writer.write(sample(0))
    writer.write(sample(1, waveform=np.zeros(600 * 16000, np.float32)))
    writer.close()
    dataset = ShardDataset(tmp_path, max_skipped=0.5, limits=PromptLimits(longest=30 * 16000))
    assert (
        len(dataset) == 1
        and "sample s-1 has 600.00 s of audio, the longest allowed are 30.00 s" in dataset.skipped[0].message
    )
    assert len(ShardDataset(tmp_path)) == 2


def test_clips_too_short_for_the_encoder_are_counted(tmp_path: Path) -> None:
    """Catches a clip of 10 ms that stops the run when its turn comes, and one that counts against no bound."""
    members = [(f"{name}{end}", data) for name, frames in (("a", 16000), ("b", 160), ("c", 16000)) for end, data in
               ((".json", text()), (".wav", wav(frames=frames)))]  # fmt: skip
    path = tar(tmp_path / "x.tar", *members)
    limits = PromptLimits(shortest=1121)
    with pytest.raises(
        CordError, match=r"sample b has 0\.010 s of audio, too short for the encoder, which takes 0\.070"
    ):
        ShardDataset(path, limits=limits)
    dataset = ShardDataset(path, limits=limits, max_skipped=0.5)
    assert dataset.ids == ["a", "c"] and sum(item.samples for item in dataset.skipped) == 1
    with pytest.raises(CordError, match=r"1 of 3 samples cannot be used, more than max_skipped=0\.3"):
        ShardDataset(path, limits=limits, max_skipped=0.3)


def test_compressed_audio_is_checked_when_the_set_is_opened(tmp_path: Path) -> None:
    """Catches half a FLAC file that is only found hours later."""
    good, bad = flac(), flac()[:-40]
    path = tar(tmp_path / "x.tar", ("a.json", text()), ("a.flac", good), ("b.json", text()), ("b.flac", bad))
    with pytest.raises(CordError, match=r"sample b: audio is cut off: \d+ of 24000 samples"):
        ShardDataset(path)
    assert ShardDataset(path, max_skipped=0.5).ids == ["a"]
