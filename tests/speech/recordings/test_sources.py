"""Rows come from the files of other programs: Parquet, saved data sets, foreign tars and lhotse's cuts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.speech import shard_set
from megatron_cord.speech.recordings import recording_set
from megatron_cord.speech.recordings.audio import RecordedAddress, UnreadableError
from megatron_cord.speech.recordings.config import RecordingSetConfig
from megatron_cord.speech.recordings.plan import plan_recording_set
from megatron_cord.speech.recordings.recording_set import make_recording_set
from megatron_cord.speech.recordings.rows import rows_fingerprint
from megatron_cord.speech.recordings.sources.files import FileRows
from megatron_cord.speech.recordings.sources.open_source import open_source
from megatron_cord.speech.recordings.sources.tars import find_tars
from tests.speech.recordings.made import rejects, voice, write_rows, write_set, write_voice


def encoded(number: int, *, rate: int = 22050, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, voice(0.3 + 0.1 * number, rate, seed=number), rate, format=kind)
    return file.getvalue()


def lengths(directory: Path) -> list[float]:
    dataset = ShardDataset(directory)
    return [round(len(dataset[i].waveform) / 16000, 2) for i in range(len(dataset))]


def test_parquet_with_bytes_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a column of type Audio that is read as a path, and row groups that are read in another order.

    Also the recordings of many shards in memory, waiting for workers.
    """
    made: list[int] = []  # shards, when each block of rows is looked at

    def counted(rows: Any) -> str:
        made.append(len(list((tmp_path / "set").glob("*.receipt.json"))))
        return rows_fingerprint(rows)

    monkeypatch.setattr(recording_set, "rows_fingerprint", counted)
    monkeypatch.setattr(shard_set, "_MOST_BYTES", 1)
    write_voice(tmp_path / "outside.ogg", 0.9)
    rows = [
        {"audio": {"bytes": encoded(i), "path": f"{i}.flac"}, "sentence": f"Number {i}?", "answer": i} for i in range(4)
    ]
    rows.append({"audio": {"bytes": None, "path": "outside.ogg"}, "sentence": "And this?", "answer": 9})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    config = RecordingSetConfig(str(tmp_path / "rows.parquet"), fields={"question": "sentence"}, shard_size=2)
    make_recording_set(config, tmp_path / "set", workers=2)
    assert made == [0, 1, 2]
    assert lengths(tmp_path / "set") == [0.3, 0.4, 0.5, 0.6, 0.9]
    assert ShardDataset(tmp_path / "set").ids == [f"row-{i}" for i in range(1, 6)]


def test_a_saved_data_set(tmp_path: Path) -> None:
    """Would catch a saved column of type Audio that only a decoder of another library would read."""
    import datasets

    audio = [{"bytes": encoded(i, kind="OGG", rate=16000), "path": None} for i in range(3)]
    data = datasets.Dataset.from_dict({"id": ["a", "b", "c"], "audio": audio, "question": ["One?", "Two?", "Three?"]})
    data.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(str(tmp_path / "saved"))
    make_recording_set(RecordingSetConfig(str(tmp_path / "saved")), tmp_path / "set")
    assert lengths(tmp_path / "set") == [0.3, 0.4, 0.5] and ShardDataset(tmp_path / "set").ids == ["a", "b", "c"]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_other_programs(tmp_path: Path) -> None:
    """Would catch a transcript in a text file that is not read, and a file of a sample that is dropped in silence."""
    text = json.dumps({"question": "Which?", "answer": "4"}).encode()
    write_tar(
        tmp_path / "a-0.tar",
        {
            "d/u1.flac": encoded(0),
            "d/u1.txt": b"Who is it?\n",
            "u.2.json": text,
            "u.2.mp3": encoded(1, kind="MP3"),
        },
    )
    write_tar(tmp_path / "a-1.tar", {"u3.wav": encoded(2, kind="WAV"), "._u3.wav": b"", "u4.flac": encoded(3)})
    config = RecordingSetConfig(str(tmp_path / "a-*.tar"), max_rejects=0.5)
    make_recording_set(RecordingSetConfig(str(tmp_path / "a-0.tar")), tmp_path / "one")
    dataset = ShardDataset(tmp_path / "one")
    assert dataset.ids == ["d_u1", "u_2"] and dataset[0].question == "Who is it?" and dataset[1].answer == "4"
    expected = decode_audio(encoded(0), "")
    assert np.abs(dataset[0].waveform - expected).max() < 1e-4
    make_recording_set(config, tmp_path / "both")
    assert set(rejects(tmp_path / "both")) == {"u3", "u4"}
    write_tar(tmp_path / "b.tar", {"u1.flac": encoded(0), "u1.txt": b"Who?", "u1.spk": b"12"})
    with pytest.raises(CordError, match=r"b.tar, b.tar, sample u1: its field 'spk' is used by nothing"):
        make_recording_set(RecordingSetConfig(str(tmp_path / "b.tar")), tmp_path / "b")
    with tarfile.open(tmp_path / "a-0.tar") as tar:
        place = tar.getmembers()[-1].offset_data + 100
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a-0.tar").read_bytes()[:place])
    make_recording_set(RecordingSetConfig(str(tmp_path / "cut.tar"), max_rejects=0.9), tmp_path / "cut")
    assert ShardDataset(tmp_path / "cut").ids == ["d_u1"]
    assert any("the tar is truncated" in reason for reason in rejects(tmp_path / "cut").values())
    (tmp_path / "packed.tar.gz").touch()
    with pytest.raises(CordError, match=r"packed.tar.gz is compressed"):
        make_recording_set(RecordingSetConfig(str(tmp_path / "packed.tar.gz")), tmp_path / "packed")


def test_tars_are_added_and_have_any_names(tmp_path: Path) -> None:
    """Would catch finished shards that are lost with each tar that is added, and a name that is no UTF-8."""
    texts, times = {"question": "Which?"}, []
    for number, name in enumerate(("u", "n\udce9")):
        files = {f"{name}.flac": encoded(number), f"{name}.json": json.dumps(texts).encode()}
        write_tar(tmp_path / f"a-{number}.tar", files)
        config = RecordingSetConfig(str(tmp_path / "a-*.tar"), shard_size=1, max_rejects=0.5)
        made = make_recording_set(config, tmp_path / "set")
        times.append((tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns)
    assert times[0] == times[1] and made.manifest.samples == 1
    assert "lone surrogate" in rejects(tmp_path / "set")["n\udce9"]


def test_a_file_of_rows_with_tar_in_its_name(tmp_path: Path) -> None:
    """Would catch rows that are read as a tar, alone or beside tars."""
    rows = write_rows(tmp_path / "commands.target.jsonl", [])
    (tmp_path / "a.tar").touch()
    (tmp_path / ".b.tar.partial").touch()
    assert isinstance(open_source(RecordingSetConfig(str(rows))), FileRows)
    assert find_tars(str(tmp_path)) == [tmp_path / "a.tar"]
    (tmp_path / "c.tar.gz").touch()
    for given in (tmp_path, tmp_path / "*.tar*", tmp_path / "c.tar.gz"):
        with pytest.raises(CordError, match=r"c\.tar\.gz is compressed"):
            open_source(RecordingSetConfig(str(given)))


def test_an_address_that_fails_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a damaged archive that ends the work, and a row that is left out because the hub was away."""
    fsspec.filesystem("memory").pipe("/damaged.zip", b"no archive")
    with pytest.raises(UnreadableError, match=r"its archive is damaged \(zip://a.wav::memory://damaged.zip: "):
        RecordedAddress("zip://a.wav::memory://damaged.zip").read()
    for error in (httpx.ConnectError("refused"), httpx.ReadTimeout(""), httpx.RemoteProtocolError("cut"), OSError("x")):

        def fail(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(fsspec, "open", fail)
        with pytest.raises(CordError, match=r"the hub does not give it .*what is complete is kept") as caught:
            RecordedAddress("hf://datasets/lab/speech@1/a.wav").read()
        assert not isinstance(caught.value, UnreadableError)


def test_shards_of_this_project_are_such_tars(tmp_path: Path) -> None:
    """Would catch a field that is written and not read back."""
    make_recording_set(RecordingSetConfig(str(write_set(tmp_path, 3))), tmp_path / "first")
    make_recording_set(RecordingSetConfig(str(tmp_path / "first")), tmp_path / "second")
    first, second = ShardDataset(tmp_path / "first"), ShardDataset(tmp_path / "second")
    for index in range(3):
        assert (first[index].waveform == second[index].waveform).all()
        assert first.without_audio(index).question == second.without_audio(index).question


@pytest.fixture
def cuts(tmp_path: Path) -> Any:
    """Return a manifest of two cuts of one recording and one of another."""
    lhotse = pytest.importorskip("lhotse")
    write_voice(tmp_path / "audio" / "long take.wav", 2.0, 44100, channels=2)
    write_voice(tmp_path / "audio" / "b.flac", 0.5, 8000, seed=1)
    made = []
    for name, file, start, duration in (
        ("x", "long take.wav", 0.25, 0.5),
        ("y", "long take.wav", 1.0, 0.75),
        ("z", "b.flac", 0, 0.5),
    ):
        recording = lhotse.Recording.from_file(tmp_path / "audio" / file)
        recording.sources[0].source = f"audio/{file}"  # relative to the manifest
        channel = list(range(recording.num_channels)) if recording.num_channels > 1 else 0
        supervision = lhotse.SupervisionSegment(
            id=name, recording_id=recording.id, start=0, duration=duration, channel=channel, text=f"What is {name}?",
            speaker="anna", language="English", custom={"answer": name},
        )  # fmt: skip
        kind = lhotse.MultiCut if recording.num_channels > 1 else lhotse.MonoCut
        made.append(kind(name, start, duration, channel, supervisions=[supervision], recording=recording))
    return lhotse.CutSet.from_cuts(made)


def test_cuts_of_lhotse(cuts: Any, tmp_path: Path) -> None:
    """Would catch a cut that is read as its whole recording, and metadata that does not reach the sample."""
    name = "cuts.jsonl.gz"
    cuts.to_file(tmp_path / name)
    made = make_recording_set(RecordingSetConfig(str(tmp_path / name), shard_size=2), tmp_path / "set")
    assert made.manifest.voices == {"anna": 3} and lengths(tmp_path / "set") == [0.5, 0.75, 0.5]
    sample = ShardDataset(tmp_path / "set")[1]
    assert (sample.id, sample.question, sample.answer) == ("y", "What is y?", "y")
    whole = decode_audio((tmp_path / "audio" / "long take.wav").read_bytes(), "")
    assert np.abs(sample.waveform[400:-400] - whole[16400:27600]).max() < 0.01  # cut before it is resampled
    (tmp_path / "audio" / "b.flac").unlink()
    cuts.to_file(tmp_path / "plain.jsonl")
    make_recording_set(RecordingSetConfig(str(tmp_path / "plain.jsonl"), max_rejects=0.5), tmp_path / "gone")
    assert rejects(tmp_path / "gone")["z"].startswith("its file is missing")


def test_lhotse_shar(cuts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch recordings inside Shar's own tars that are looked for as files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    make_recording_set(RecordingSetConfig(str(tmp_path / "shar"), shard_size=2), tmp_path / "set", workers=2)
    assert lengths(tmp_path / "set") == [0.5, 0.75, 0.5]


def test_a_plan_measures_some_rows(tmp_path: Path) -> None:
    """Would catch a projection of the first rows alone, or of another number of rows."""
    rows = [json.loads(line) for line in write_set(tmp_path, 8).read_text().splitlines()]
    many = [row | {"id": f"{row['id']}-{turn}"} for turn in range(25) for row in rows]
    path = write_rows(tmp_path / "many.jsonl", [r if i < 150 else r | {"audio": "gone"} for i, r in enumerate(many)])
    planned = plan_recording_set(RecordingSetConfig(str(path)), 40)
    assert (planned.questions, planned.tried) == (200, 40) and planned.rejects == pytest.approx(0.25)
    assert planned.audio_seconds == pytest.approx(150 * 0.335, rel=0.05) and planned.seconds > 0
    assert not list(tmp_path.glob("**/*.tar"))
