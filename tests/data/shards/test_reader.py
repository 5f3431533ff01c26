"""Shards that other programs made or that are broken: read, or refused with their file and sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from tests.data.shards.shard_files import AUDIO, cut, flac, remove, tar, text, wav, write


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
