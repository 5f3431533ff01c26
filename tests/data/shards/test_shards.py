"""Shards: what is written is read back, and whatever is broken is named with its file and sample."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.samples import PromptLimits, Sample
from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.writer import ShardWriter, encode_sample
from megatron_cord.errors import CordError

AUDIO = np.linspace(-0.5, 0.5, 320, dtype=np.float32)


def sample(number: int, **changes: object) -> Sample:
    fields: dict[str, object] = {
        "id": f"s-{number}",
        "question": f"what is {number} plus ½",
        "waveform": AUDIO * (number % 3),
        "answer": str(number),
        "voice": "en-us+f2",
    }
    return Sample(**{**fields, **changes})  # type: ignore[arg-type]


def write(directory: Path, count: int = 5, shard_size: int = 2) -> Manifest:
    writer = ShardWriter(directory, shard_size=shard_size, source={"seed": 3})
    for number in range(count):
        writer.write(sample(number))
    return writer.close()


def wav(rate: int = 16000, channels: int = 1, width: int = 2, frames: int = 100) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(frames * channels * width))
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def text(question: object = "what is one plus one", **more: object) -> bytes:
    return json.dumps({"question": question, **more}).encode()


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


def test_patterns_and_single_files(tmp_path: Path) -> None:
    """Would catch shards of other origin that cannot be read for want of a manifest."""
    write(tmp_path)
    assert len(ShardDataset(str(tmp_path / "shard-*.tar"))) == 5
    assert [ShardDataset(tmp_path / "shard-000001.tar")[index].id for index in range(2)] == ["s-2", "s-3"]
    assert (
        ShardDataset(tar(tmp_path / "x.tar", ("a/b/k.wav", wav()), ("a/b/k.json", text()), ("a/b/k.txt", b"ignored")))[
            0
        ].id
        == "a/b/k"
    )


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


def remove(directory: Path) -> None:
    (directory / "shard-000001.tar").unlink()


def cut(directory: Path) -> None:
    path = directory / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"shard-000001\.tar is missing"),
        (cut, r"shard-000001\.tar has 3000 of \d+ bytes"),
        (
            lambda directory: (directory / "manifest.json").write_text('{"format": 1}'),
            r"manifest\.json .*no field 'shards'",
        ),
        (lambda directory: (directory / "manifest.json").write_text("{"), r"manifest\.json is not a manifest"),
        (lambda directory: (directory / "manifest.json").write_text("[]"), r"manifest\.json is not a manifest"),
        (lambda directory: (directory / "manifest.json").write_text('{"format": 9}'), "format 9"),
        (lambda directory: (directory / "manifest.json").write_bytes(b"\xff"), r"manifest\.json is not a manifest"),
    ],
)
def test_damaged_directories_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """Would catch a smaller data set in silence, or a traceback."""
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(CordError, match=message) as caught:
        ShardDataset(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("k.wav", wav()),), "sample k has no text"),
        ((("k.json", text()),), "sample k has no audio"),
        ((("k.wav", wav()), ("k.json", text(question=""))), "sample k has no text"),
        ((("k.wav", wav()), ("k.json", text(question=5))), "sample k has no text"),
        ((("k.wav", wav()), ("k.json", b"{}")), "sample k has no text"),
        ((("k.wav", wav()), ("k.json", b"[1]")), "sample k: its JSON is no object"),
        ((("k.wav", wav()), ("k.json", b'{"question"')), "sample k: its text is not JSON"),
        ((("k.wav", wav()), ("k.json", b'{"question": "\xff"}')), "sample k: its text is not JSON in UTF-8"),
        ((("k.wav", wav()), ("k.json", b"[" * 100000)), "sample k: its text is not JSON"),
        ((("k.wav", wav()), ("k.json", text(answer=5))), "sample k: answer is 5"),
        (
            (("k.wav", wav()), ("k.json", text(id="other"))),
            "sample k: its JSON has the id 'other', its files have the name 'k'",
        ),
        ((("k.wav", wav(frames=0)), ("k.json", text())), "sample k: the recording has no samples"),
        ((("k.wav", b"fLaC" * 20), ("k.json", text())), "sample k: not a recording"),
        ((("k.wav", b""), ("k.json", text())), "sample k: not a recording"),
        ((("k.wav", wav()), ("k.json", text(prompt="Be brief."))), "sample k: its field 'prompt' is used by nothing"),
        ((("k.wav", wav()), ("k.json", text(context="Sum up."))), "sample k: its field 'context' is used by"),
        ((("k.wav", wav()), ("k.json", text(system=" "))), "sample k: system is empty; write text or leave it out"),
        ((("k.wav", wav()), ("k.json", text(instruction=5))), "sample k: instruction is 5; write text"),
        ((("k.wav", wav()), ("k.json", text(audio="k.wav"))), "sample k: its field 'audio' is a recording"),
        ((("k.wav", wav()), ("k.json", b'{"question": "a", "question": "b"}')), "the field 'question' comes twice"),
        ((("k.wav", wav()), ("k.json", b'{"text": "a", "label": 1}')), r"its fields: label, text\)"),
        ((("k.txt", b"what"), ("k.json", text())), r"sample k has no audio \(.wav, .flac …\), only k.txt, k.json; add"),
        ((("k.wav", wav()), ("k.json", text()), ("k.json", text())), "sample k comes twice"),
        ((), "no samples"),
    ],
)
def test_bad_samples_are_named_at_once(tmp_path: Path, members: tuple[tuple[str, bytes], ...], message: str) -> None:
    """Would catch a bad sample that stops a run hours after its start, or an error without the shard's name."""
    path = tar(tmp_path / "bad.tar", *members)
    with pytest.raises(CordError, match=message) as caught:
        ShardDataset(path)
    assert "bad.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_ids_are_unique_over_shards(tmp_path: Path) -> None:
    """Would catch two samples under one name in records and in the teacher's cache."""
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / name, ("k.wav", wav()), ("k.json", text()))
    with pytest.raises(CordError, match=r"b\.tar: sample k is in .*a\.tar too"):
        ShardDataset(str(tmp_path / "*.tar"))


def test_no_such_shards(tmp_path: Path) -> None:
    """Would catch an empty pattern that is taken for an empty set."""
    with pytest.raises(CordError, match=r"none-\*\.tar: no such"):
        ShardDataset(str(tmp_path / "none-*.tar"))


@pytest.mark.parametrize("size", [0, 100, 512, 700, 1024, 1536, 2048, 2600, 3072])
def test_truncated_tar_without_manifest(tmp_path: Path, size: int) -> None:
    """Would catch tarfile's habit of taking some damages for the end of the file."""
    path = tar(tmp_path / "cut.tar", ("j.wav", wav()), ("j.json", text()), ("k.wav", wav()), ("k.json", text()))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CordError, match=r"cut\.tar"):
        ShardDataset(path)


def test_damage_in_the_middle_of_a_tar(tmp_path: Path) -> None:
    """Would catch the loss of everything behind a damaged header."""
    path = tar(tmp_path / "hole.tar", ("j.wav", wav()), ("j.json", text()), ("k.wav", wav()), ("k.json", text()))
    content = bytearray(path.read_bytes())
    content[2048:2060] = b"\xff" * 12  # the header of k.wav
    path.write_bytes(content)
    with pytest.raises(CordError, match=r"hole\.tar is truncated or damaged at byte 2048"):
        ShardDataset(path)


def test_audio_cut_off_inside_the_wav(tmp_path: Path) -> None:
    """Would catch audio that is shorter than its header says, or read on into the next file's bytes."""
    path = tar(tmp_path / "short.tar", ("k.wav", wav(frames=900)[:500]), ("k.json", text()))
    with pytest.raises(CordError, match=r"short\.tar: sample k: audio is cut off"):
        ShardDataset(path)


def test_shard_that_vanishes_during_a_run(tmp_path: Path) -> None:
    """Would catch a traceback from the middle of training."""
    write(tmp_path)
    dataset = ShardDataset(tmp_path)
    remove(tmp_path)
    with pytest.raises(CordError, match=r"shard-000001\.tar: sample s-2: cannot be read"):
        dataset[2]


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 243), value=st.integers(0, 255), length=st.integers(0, 244))
def test_damaged_wavs_never_crash(position: int, value: int, length: int) -> None:
    """Would catch an exception other than a CordError, or audio outside its range, for any damaged byte or length."""
    content = bytearray(encode_wav(AUDIO[:100]))
    content[position] = value
    try:
        waveform = decode_audio(bytes(content[:length]), "x")
    except CordError:
        return
    assert waveform.ndim == 1 and np.abs(waveform).max() <= 1.0


def damaged_set(directory: Path) -> Path:
    """Write 12 samples in shards of four: one twice, one cut off, one without text, and a shard that breaks off."""
    write(directory, count=12, shard_size=4)
    manifest = Manifest.read(directory)
    first, second, _ = (directory / entry.name for entry in manifest.shards)
    good = wav()
    tar(
        first,
        ("a.json", text()), ("a.wav", good),
        ("b.json", text()), ("b.wav", wav()[:90]),
        ("c.wav", good),
        ("s-8.json", text()), ("s-8.wav", good),
    )  # fmt: skip
    content = second.read_bytes()
    second.write_bytes(content[: content.index(b"s-6.wav") + 600])
    return directory


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


@settings(max_examples=60, deadline=2000)
@given(data=st.data())
def test_a_damaged_shard_never_crashes_the_reader(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Would catch any exception but CordError, or a hang, on a shard with bytes changed, cut off or put in."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    tar(path, ("a.json", text()), ("a.wav", wav(frames=20)), ("b.json", text(answer="4")), ("b.wav", wav(frames=20)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        dataset = ShardDataset(path, max_skipped=0.99)
    except CordError:
        return
    for index in range(len(dataset)):
        try:
            item = dataset[index]
        except CordError:
            continue
        assert item.question and item.waveform.ndim == 1


def test_what_tar_writes_for_a_folder(tmp_path: Path) -> None:
    """Catches "./q1.json" that is another sample than q1, and macOS's hidden files that are taken for samples."""
    members = [
        ("./q1.json", text(id="q1")), ("./q1.wav", wav()),
        ("./._q1.json", b"\0\5\x16\7"), ("./._q1.wav", b"\0\5\x16\7"), ("./.DS_Store", b"Bud1"),
        ("__MACOSX/._q2.wav", b"\0\5"), ("./set/q3.json", text(id="q3")), ("./set/q3.wav", wav()),
    ]  # fmt: skip
    dataset = ShardDataset(tar(tmp_path / "x.tar", *members))
    assert dataset.ids == ["q1", "set/q3"] and dataset.skipped == []


def test_names_and_texts_as_other_programs_write_them(tmp_path: Path) -> None:
    """Catches extensions in capitals, a BOM, a numeric id and a dot in a name, each of which stopped a run."""
    members = [
        ("q1.JSON", text()), ("q1.WAV", wav()),
        ("q2.json", b"\xef\xbb\xbf" + text(metadata={"level": 3})), ("q2.Flac", flac()),
        ("3.json", text(id=3)), ("3.wav", wav()),
        ("v1.0_a.json", text(id="v1.0_a")), ("v1.0_a.wav", wav()), ("v1.0_b.json", text()), ("v1.0_b.wav", wav()),
        ("q4.wav", wav()), ("q4.json", text()), ("q4.words.json", b"[]"),
    ]  # fmt: skip
    dataset = ShardDataset(tar(tmp_path / "x.tar", *members))
    assert dataset.ids == ["q1", "q2", "3", "v1.0_a", "v1.0_b", "q4"]
    assert [len(dataset[i].waveform) for i in range(6)] == [100, 8000, 100, 100, 100, 100]
    tar(tmp_path / "y.tar", ("007.json", text(id=7)), ("007.wav", wav()))
    with pytest.raises(CordError, match="has the id 7, its files have the name '007'; make them agree"):
        ShardDataset(tmp_path / "y.tar")


def flac() -> bytes:
    """Return half a second in stereo at 48 kHz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full((24000, 2), 0.25), 48000, format="FLAC")
    return buffer.getvalue()


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


def test_sets_without_a_manifest_are_described(tmp_path: Path) -> None:
    """Catches the advice to synthesize a set that somebody recorded."""
    tar(tmp_path / "train-0.tar", ("k.wav", wav()), ("k.json", text()))
    with pytest.raises(CordError, match=r"incomplete, or a set that another program made; .* the pattern '.*/\*\.tar'"):
        ShardDataset(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "readme.txt").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").touch()
    for path, found in [
        (tmp_path / "none", r"holds no shards \(found: readme\.txt\)"),
        (tmp_path / "begun", "it is incomplete; run the same command again"),
        (tmp_path / "gone", r"no such directory or shard; check the path \(.* has begun, none, train-0\.tar\)"),
    ]:
        with pytest.raises(CordError, match=found) as caught:
            ShardDataset(path)
        assert "cord synthesize" not in str(caught.value)
