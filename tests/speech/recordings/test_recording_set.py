"""Recordings become shards: resumed after kills, corrected without loss, refused or left out with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_cord.cli import main as cli
from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import Patience
from megatron_cord.speech.recordings.config import RecordingSetConfig, recording_quality
from megatron_cord.speech.recordings.recording_set import make_recording_set
from megatron_cord.speech.shard_set import worker_context
from tests.openai_server import OpenAIServer, Reply, Request, wait_for_threads
from tests.speech.recordings.made import rejects, set_bytes, voice, write_rows, write_set, write_voice


def make_in_own_session(config: RecordingSetConfig, output: Path, workers: int) -> None:
    os.setsid()  # its workers are killed with it
    make_recording_set(config, output, workers=workers)


def test_killed_twice_ends_as_one_identical_set(tmp_path: Path) -> None:
    """Would catch a resumed set that lacks, doubles or changes a sample, and workers that take part in its content."""
    config = RecordingSetConfig(str(write_set(tmp_path, 60)), shard_size=5)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_recording_set(config, whole)
    for finished in (2, 5):
        process = worker_context(make_recording_set.__module__).Process(
            target=make_in_own_session, args=(config, broken, 1)
        )
        process.start()
        deadline = time.monotonic() + 120
        while (
            len(list(broken.glob("*.receipt.json"))) < finished and process.is_alive() and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        assert not (broken / "manifest.json").exists()
    make_recording_set(config, broken, workers=2)
    assert set_bytes(broken) == set_bytes(whole)
    assert not list(broken.glob(".*.partial"))
    before = {path: path.stat().st_mtime_ns for path in broken.iterdir() if path.suffix == ".tar"}
    make_recording_set(config, broken)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (broken / "shard-000003.tar").unlink()  # lost later: the same call makes it again
    make_recording_set(config, broken)
    assert set_bytes(broken) == set_bytes(whole)


def test_samples_are_what_the_decoder_makes_of_the_files(tmp_path: Path) -> None:
    """Would catch a recording under another's transcript, and one that is resampled or mixed in another way."""
    rows = write_set(tmp_path, 9)
    made = make_recording_set(RecordingSetConfig(str(rows), shard_size=4), tmp_path / "set")
    dataset = ShardDataset(tmp_path / "set")
    assert made.rejects == {} and made.manifest.samples == len(dataset) == 9
    for index, row in enumerate(map(json.loads, rows.read_text().splitlines())):
        sample = dataset[index]
        assert (sample.id, sample.question, sample.answer) == (row["id"], row["question"], str(row["answer"]))
        expected = decode_audio((tmp_path / row["audio"]).read_bytes(), "file")
        assert np.abs(sample.waveform - expected).max() < 0.51 / 32767
    assert made.manifest.seconds == pytest.approx(sum(len(dataset[i].waveform) for i in range(9)) / 16000, abs=1e-3)


def bad_rows(directory: Path) -> list[tuple[str, dict[str, Any], str]]:
    """Return a name, a row and the reason why it is left out, for everything that can be wrong with a row."""
    good = {"audio": "good.wav", "question": "What is one plus two?"}
    write_voice(directory / "good.wav")
    write_voice(directory / "long.flac", 31.0, 8000)
    soundfile.write(directory / "silent.wav", np.full(16000, 1e-4, np.float32), 16000)
    soundfile.write(directory / "empty.wav", np.zeros(0, np.float32), 16000)
    (directory / "text.wav").write_text("no recording")
    (directory / "cut.wav").write_bytes((directory / "good.wav").read_bytes()[:5000])
    (directory / "folder").mkdir()
    return [
        ("gone", good | {"audio": "gone.wav"}, "its file is missing"),
        ("folder", good | {"audio": "folder"}, "its file is missing"),
        ("text", good | {"audio": "text.wav"}, "its recording is not decodable (text.wav: not a recording"),
        ("cut", good | {"audio": "cut.wav"}, "its recording is not decodable (cut.wav: audio is cut off"),
        ("empty", good | {"audio": "empty.wav"}, "its recording is not decodable (empty.wav: the recording has no"),
        ("long", good | {"audio": "long.flac"}, "its recording is too long (31.00 s)"),
        ("silent", good | {"audio": "silent.wav"}, "its recording is mostly silent"),
        ("number", good | {"audio": 7}, "its 'audio' is 7, neither a path nor bytes"),
        ("none", {"question": "Where?"}, "it has no recording, its 'audio'"),
        ("untold", {"audio": "good.wav"}, "it has no transcript, its 'question'"),
        ("blank", good | {"question": "  "}, "it has no transcript, its 'question'"),
        ("signs", good | {"question": "?!"}, "its transcript has no words ('?!')"),
        ("list", good | {"answer": ["1"]}, "its 'answer' is no text"),
        ("choice", good | {"answer": "C", "choices": ["one", "two"]}, "its answer 'C' is none of its choices"),
        ("both", good | {"turns": [{"role": "user", "content": "hello"}]}, "it has turns and 'question'"),
        ("turns", {"turns": [{"role": "assistant", "content": "hello"}]}, "its last turn is the assistant's"),
        ("klingon", good | {"language": "?"}, "its language is neither a code"),
        (
            "german",
            good | {"question": "Wie viele Äpfel bleiben übrig, wenn du drei davon isst?", "language": "en"},
            "its transcript is not in the language stated (de in the place of en",
        ),
    ]


def test_what_is_wrong_with_a_row_is_one_line(tmp_path: Path) -> None:
    """Would catch a bad row that ends the work, passes, or is left out in silence or for another reason."""
    cases = bad_rows(tmp_path)
    good = {"audio": str(tmp_path / "good.wav"), "question": "What is one plus two?", "language": "en-US"}
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"id": "first"} | good, *({"id": name} | row for name, row, _ in cases), {"id": "first"} | good],
    )
    with rows.open("ab") as file:
        file.write(b"{broken\n\xff\xfe\n")
    config = RecordingSetConfig(str(rows), shard_size=4)
    with pytest.raises(CordError, match=r"21 of 22 rows were left out, most often because .* see .*rejects.jsonl"):
        make_recording_set(config, tmp_path / "set")
    result = make_recording_set(
        RecordingSetConfig(str(rows), shard_size=4, max_rejects=1.0), tmp_path / "set", workers=2
    )
    reasons = rejects(tmp_path / "set")
    for name, _, reason in cases:
        assert reasons[name].startswith(reason), name
    assert reasons["first"] == "its id comes twice"
    assert reasons["line 21"].startswith("it is not JSON") and reasons["line 22"].startswith("it is not UTF-8")
    assert sum(result.rejects.values()) == len(reasons) == 21 and result.manifest.samples == 1
    assert all("\n" not in reason and len(reason) < 400 for reason in reasons.values())
    assert ShardDataset(tmp_path / "set")[0].id == "first"


def test_rows_are_corrected_and_continued_without_loss(tmp_path: Path) -> None:
    """Would catch hours of work made again for one corrected row, and shards of rows that are gone."""
    path = write_set(tmp_path, 12)
    config = RecordingSetConfig(str(path), shard_size=4, max_rejects=1.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    missing = tmp_path / rows[5]["audio"]
    content = missing.read_bytes()
    missing.unlink()
    assert make_recording_set(config, tmp_path / "set").rejects == {"its file is missing": 1}

    def remade() -> list[str]:
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.tar")}
        made = make_recording_set(config, tmp_path / "set")
        assert made.manifest.samples == len(ShardDataset(tmp_path / "set"))
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.tar")}
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    time.sleep(0.02)
    missing.write_bytes(content)  # as a user does who reads rejects.jsonl
    assert remade() == ["shard-000001.tar"]
    rows[9]["question"] = "What is nine plus two, please?"
    write_rows(path, [*rows, rows[0] | {"id": "more"}])
    assert remade() == ["shard-000002.tar", "shard-000003.tar"]
    assert [ShardDataset(tmp_path / "set").ids[i] for i in (0, 12)] == ["r0", "more"]
    write_rows(path, rows[:7])
    assert remade() == ["shard-000001.tar", "shard-000002.tar", "shard-000003.tar"]
    assert not list((tmp_path / "set").glob("shard-000002*"))
    fresh = tmp_path / "fresh"
    make_recording_set(config, fresh)
    assert set_bytes(fresh) == set_bytes(tmp_path / "set")
    with pytest.raises(CordError, match=r"other arguments \(shard_size\)"):
        make_recording_set(RecordingSetConfig(str(path), shard_size=5), tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    other = write_rows(tmp_path / "elsewhere" / "rows.jsonl", [rows[0] | {"audio": str(tmp_path / rows[0]["audio"])}])
    with pytest.raises(CordError, match=r"holds shards of other rows than those of .*elsewhere/rows.jsonl"):
        make_recording_set(RecordingSetConfig(str(other), shard_size=4, max_rejects=1.0), tmp_path / "set")
    assert set_bytes(fresh) == set_bytes(tmp_path / "set")


def test_an_unused_field_ends_the_work_and_costs_nothing(tmp_path: Path) -> None:
    """Would catch a speaker's age dropped in silence, and finished shards that are lost with the refusal."""
    path = write_set(tmp_path, 24)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[22] |= {"age": 7, "metadata": {"room": 3}}
    write_rows(path, rows)
    with pytest.raises(CordError, match=r"rows.jsonl, line 23: its field 'age' is used by nothing .*is kept"):
        make_recording_set(RecordingSetConfig(str(path), shard_size=2), tmp_path / "set", workers=2)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.tar")}
    assert 8 <= len(times) <= 11  # of 11 before the field, at most 3 wait for a worker
    config = RecordingSetConfig(str(path), shard_size=2, ignore_fields=("age",))
    assert make_recording_set(config, tmp_path / "set").manifest.samples == 24
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_fields_have_other_names_and_ids_any_characters(tmp_path: Path) -> None:
    """Would catch a renamed field that is not read, and an id that becomes a folder of the tar."""
    write_voice(tmp_path / "a.wav")
    row = {"clip": "a.wav", "sentence": "How are you?", "spk": 12, "utt": "2024/05/März 3.wav", "metadata": {"k": 1}}
    config = RecordingSetConfig(
        str(write_rows(tmp_path / "rows.jsonl", [row])),
        fields={"audio": "clip", "question": "sentence", "voice": "spk", "id": "utt"},
        language="en",
    )
    assert make_recording_set(config, tmp_path / "set").manifest.voices == {"12": 1}
    sample = ShardDataset(tmp_path / "set")[0]
    assert (sample.id, sample.question, sample.voice) == ("2024_05_M_rz_3_wav", "How are you?", "12")
    tar = (tmp_path / "set" / "shard-000000.tar").read_bytes()
    assert '"metadata": {"k": 1, "id": "2024/05/März 3.wav", "language": "en"}'.encode() in tar


def test_conversations_keep_their_recordings_in_order(tmp_path: Path) -> None:
    """Would catch turns whose recordings are swapped or lost, or whose system prompt is dropped."""
    for number in range(3):
        write_voice(tmp_path / f"{number}.flac", 0.3 + 0.1 * number, 22050, seed=number)
    turns = [
        {"role": "user", "content": [{"audio": "2.flac", "text": "Hello."}, "Be brief."]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"audio": "0.flac", "text": "One."}, {"audio": "1.flac", "text": "Two."}]},
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": "t", "turns": turns, "system": "Listen.", "answer": "3"}])
    make_recording_set(RecordingSetConfig(str(rows)), tmp_path / "set")
    sample = ShardDataset(tmp_path / "set")[0]
    assert [round(len(clip) / 16000, 2) for clip in sample.recordings] == [0.5, 0.3, 0.4]
    assert sample.system == "Listen." and sample.question == "One.\nTwo." and len(sample.turns) == 3
    missing = [*turns[:2], {"role": "user", "content": [{"audio": "9.flac", "text": "Nine."}]}]
    write_rows(rows, [{"id": "t", "turns": missing}])
    with pytest.raises(CordError, match="1 of 1 rows were left out, most often because its file is missing"):
        make_recording_set(RecordingSetConfig(str(rows)), tmp_path / "set2")


def test_a_recognizer_leaves_out_what_it_mishears(tmp_path: Path) -> None:
    """Would catch a check that passes everything, and recordings that are sent again after the endpoint failed."""
    rows = write_set(tmp_path, 24)
    texts = [json.loads(line)["question"] for line in rows.read_text().splitlines()]

    def reply(requests: list[Request]) -> Reply:
        if len(requests) == 15:
            return Reply(b"{}", status=401)
        place = len(requests) - 1 if len(requests) < 15 else len(requests) - 6  # the second ten are sent once more
        return Reply(json.dumps({"text": "something else" if place % 12 == 3 else texts[place]}).encode())

    with OpenAIServer(reply) as server:
        quality = recording_quality(asr_url=server.url, max_word_error_rate=0.3)
        config = RecordingSetConfig(str(rows), quality=quality, patience=Patience(tries=1))
        with pytest.raises(CordError, match="what is complete is kept: call again when the endpoint is well"):
            make_recording_set(config, tmp_path / "set")
        result = make_recording_set(config, tmp_path / "set")
        assert len(server.requests) == 15 + 14
    assert result.rejects == {"it is misheard": 2} and set(rejects(tmp_path / "set")) == {"r3", "r15"}


def test_a_recognizer_that_refuses_one_recording_and_moves(tmp_path: Path) -> None:
    """Would catch a refused recording that stops the set for good, connections and a thread that stay for each shard.

    Also a set that has to be deleted because its recognizer has another address, and one that is checked in part.
    """
    rows = write_set(tmp_path, 6)
    texts = [json.loads(line)["question"] for line in rows.read_text().splitlines()]
    threads = threading.active_count()

    def transcribe(requests: list[Request]) -> Reply:
        place = len(requests) - 1
        return Reply(b"too large", 413) if place == 2 else Reply(json.dumps({"text": texts[place]}).encode())

    def config(url: str | None) -> RecordingSetConfig:
        return RecordingSetConfig(str(rows), shard_size=2, quality=recording_quality(asr_url=url))

    with OpenAIServer(transcribe) as server:
        result = make_recording_set(config(server.url), tmp_path / "set")
    wait_for_threads(threads)
    assert result.rejects == {"the recognizer refused it": 1} and result.manifest.samples == 5
    assert "status 413: too large" in rejects(tmp_path / "set")["r2"]
    before = set_bytes(tmp_path / "set")
    (tmp_path / "set" / "shard-000000.tar").unlink()
    with OpenAIServer(transcribe) as moved:
        make_recording_set(config(moved.url), tmp_path / "set")
        assert len(moved.requests) == 2
    after = set_bytes(tmp_path / "set")
    assert before["shard-000000.tar"] == after["shard-000000.tar"] and before.keys() == after.keys()
    with pytest.raises(CordError, match=r"other arguments \(quality\)"):
        make_recording_set(config(None), tmp_path / "set")


def test_the_command_makes_plans_checks_and_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch an option that does not reach the set, and a command that takes --from for `info` and `check`."""
    rows, output = write_set(tmp_path, 8), tmp_path / "set"

    def cord(*arguments: str) -> str:
        assert cli.invoke(cli.cord, ["shards", *arguments], "cord") == 0
        return capsys.readouterr().out

    assert f"{rows}: 8 rows at" in cord("--from", str(rows), "--plan", "4") and not output.exists()
    assert "8 samples, 3 s of speech" in cord("--from", str(rows), "--output", str(output), "--shard-size", "3")
    assert json.loads((output / "manifest.json").read_text())["source"]["shard_size"] == 3
    assert "8 samples, 0 problems" in cord("check", str(output))
    assert "shortest 0.3" in cord("info", str(output))
    for arguments, message in [
        (["--output", "x"], "--from SOURCE is needed"),
        (["--from", str(rows)], "--output DIR is needed"),
        (["--from", str(tmp_path / "none.jsonl"), "--output", "x"], "none.jsonl: no such file or directory; give rows"),
        (["--from", str(rows), "check", "x"], "call cord shards check DIR without it"),
        (["--from", str(rows), "--output", "x", "--fields", "text=a"], "there is no field 'text'; rows have id, audio"),
        (["--from", str(rows), "--output", "x", "--split", "train"], "--split train is for a set on the hub"),
        (["--from", str(rows), "--output", "x", "--language", "!"], "the language '!' is neither a code"),
    ]:
        with pytest.raises(CordError) as caught:
            cli.invoke(cli.cord, ["shards", *arguments], "cord")
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_commands_defaults_are_the_configurations() -> None:
    """Would catch a default in the command that drifts from what it fills."""
    given = cli.load("shards").make_context("shards", ["--from", "x"]).params
    for owner in (RecordingSetConfig("x"), recording_quality()):
        for field in dataclasses.fields(owner):
            if field.name in given and field.name not in ("source", "fields"):
                assert given[field.name] == getattr(owner, field.name), field.name


def test_a_quiet_recording_is_no_silence(tmp_path: Path) -> None:
    """Would catch speech from afar taken for silence, with the bounds of synthesized speech."""
    soundfile.write(tmp_path / "far.wav", voice(1.0, peak=0.004), 16000, subtype="PCM_24")
    rows = write_rows(tmp_path / "rows.jsonl", [{"audio": "far.wav", "question": "Who is there?"}])
    assert make_recording_set(RecordingSetConfig(str(rows)), tmp_path / "set").manifest.samples == 1
    assert ShardDataset(tmp_path / "set").ids == ["line-1"]
