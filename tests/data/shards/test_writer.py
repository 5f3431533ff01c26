"""Shards that are written: they are read back as they were, by others too, or not written at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.writer import ShardWriter, encode_sample
from megatron_cord.errors import CordError
from tests.data.shards.shard_files import sample, write


def test_notes_are_written(tmp_path: Path) -> None:
    """Catches a sample's notes that are dropped or give way to those beside it, and notes that are no JSON."""
    writer = ShardWriter(tmp_path)
    notes = {"scaffold": "think of tens", "hard": True, "level": 3}
    writer.write(sample(0, metadata=notes))
    writer.write(sample(1))
    with pytest.raises(CordError, match="sample s-2: its metadata is no JSON"):
        writer.write(sample(2, metadata={"path": tmp_path}))
    writer.close()
    assert [ShardDataset(tmp_path)[number].metadata for number in range(2)] == [notes, {}]
    texts = json.loads(encode_sample(sample(3, metadata=notes), metadata={"level": 4, "noise_snr": 9})["json"])
    assert texts["metadata"] == notes | {"level": 4, "noise_snr": 9}


def test_round_trip(tmp_path: Path) -> None:
    """Would catch lost fields, samples out of order, and audio that changes by more than 16 bits allow."""
    write(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 5
    for number in range(5):
        expected, actual = sample(number), dataset[number]
        for name in ("id", "question", "answer", "solution", "voice", "sampling_rate"):
            assert getattr(actual, name) == getattr(expected, name)
        assert actual.waveform.dtype == np.float32
        assert np.abs(actual.waveform - expected.waveform).max() <= 0.5 / 32767 + 1e-7
    with pytest.raises(IndexError):
        dataset[5]


def test_manifest_tells_the_truth(tmp_path: Path) -> None:
    """Would catch counts, seconds or checksums that are not those of the files."""
    manifest = write(tmp_path)
    assert manifest == Manifest.read(tmp_path)
    assert manifest.samples == 5 and manifest.voices == {"en-us+f2": 5} and manifest.seconds == pytest.approx(5 * 0.02)
    assert manifest.source == {"seed": 3}
    assert [entry.samples for entry in manifest.shards] == [2, 2, 1]
    for entry in manifest.shards:
        content = (tmp_path / entry.name).read_bytes()
        assert len(content) == entry.bytes and hashlib.sha256(content).hexdigest() == entry.sha256


def test_equal_samples_make_equal_files(tmp_path: Path) -> None:
    """Would catch a time stamp or an order that differs from run to run."""
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_webdataset_reads_them(tmp_path: Path) -> None:
    """Would catch a layout that only this package understands."""
    write(tmp_path)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [item["__key__"] for item in samples] == [f"s-{number}" for number in range(5)]
    assert json.loads(samples[1]["json"])["question"] == "what is 1 plus ½" and samples[1]["wav"][:4] == b"RIFF"


def test_incomplete_directories_are_invisible(tmp_path: Path) -> None:
    """Would catch training on the first shards of an interrupted synthesis, and its leftovers in the next one."""
    writer = ShardWriter(tmp_path, shard_size=1)
    for number in range(9):
        writer.write(sample(number))
    with pytest.raises(CordError, match="incomplete"):
        ShardDataset(tmp_path)
    write(tmp_path)
    assert len(list(tmp_path.glob("*.tar"))) == 3 and not list(tmp_path.glob(".*"))
    with pytest.raises(CordError, match="already"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample(0, id="a.b"), "'a.b'"),
        (sample(0, id="s-7"), "s-7 comes twice"),
        (sample(0, question=" "), "s-0 has no question"),
        (sample(0, sampling_rate=8000), "s-0: audio at 8000 Hz"),
        (sample(0, waveform=np.zeros(0, np.float32)), "s-0: audio of shape"),
        (sample(0, waveform=np.zeros((2, 9), np.float32)), "s-0: audio of shape"),
        (sample(0, waveform=np.array([np.nan], np.float32)), "s-0: audio outside"),
        (sample(0, waveform=np.array([1.5], np.float32)), "s-0: audio outside"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, bad: Sample, message: str) -> None:
    """Would catch shards that are written without complaint and refused a day later."""
    writer = ShardWriter(tmp_path)
    writer.write(sample(7))
    with pytest.raises(CordError, match=message):
        writer.write(bad)


def test_nothing_to_write_and_nowhere_to_write(tmp_path: Path) -> None:
    """Would catch an empty set with a manifest, and a traceback for a full or forbidden disk."""
    with pytest.raises(CordError, match="no samples"):
        ShardWriter(tmp_path / "empty").close()
    (tmp_path / "file").write_text("")
    writer = ShardWriter(tmp_path / "file" / "below")
    writer.write(sample(0))
    with pytest.raises(CordError, match=r"cannot write shards to .*below"):
        writer.close()
