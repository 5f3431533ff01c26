"""Endpoints that speak and transcribe, as real HTTP servers, well-behaved and not."""

from __future__ import annotations

import functools
import io
import json
import threading
import wave
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import OpenAIClient, Patience
from megatron_cord.speech.quality import QualityConfig
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.transcription import Transcriber, word_error_rate
from tests.openai_server import OpenAIServer, Reply, Request, wait_for_threads
from tests.speech.questions import write_questions

ONE_TRY = Patience(tries=1)


@functools.cache
def tone() -> bytes:
    """Return a WAV file of one second, stereo at 24 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(24000)
        file.writeframes(np.repeat((8000 * np.sin(np.arange(24000) / 10)).astype("<i2"), 2).tobytes())
    return buffer.getvalue()


def speak(requests: list[Request]) -> Reply:
    """Speak a tone, refuse the word "refuse", fail at "stumble", and transcribe the same words whatever comes."""
    newest = requests[-1]
    if b"stumble" in newest.body:
        return Reply(b"internal error", 503)
    if newest.path == "audio/transcriptions":
        return Reply(json.dumps({"text": "what is nine"}).encode())
    return Reply(b"not this word", 400) if b"refuse" in newest.body else Reply(tone())


def speak_late(requests: list[Request]) -> Reply:
    """Be away for the first request."""
    return Reply(b"starting", 503) if len(requests) == 1 else speak(requests)


def test_an_endpoint_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a busy endpoint or a refused text that ends the work, a lost key, and stereo at 24 kHz kept.

    Also connections and a thread that stay behind for each shard.
    """
    threads = threading.active_count()
    monkeypatch.setenv("SPEECH_API_KEY", "not-to-be-shown")
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"id": "a", "question": "Say one."}\n'
        '{"id": "b", "question": "Please refuse."}\n'
        '{"id": "c", "question": "Say two."}\n'
    )
    with OpenAIServer(speak_late) as server:
        synthesizer = SynthesizerConfig("openai", ("amy",), url=server.url, patience=Patience(backoff=0.01))
        config = SpokenSetConfig(str(file), shard_size=2, max_rejects=0.5, synthesizer=synthesizer)
        result = make_spoken_set(config, tmp_path / "set")
    wait_for_threads(threads)
    assert {request.key for request in server.requests} == {"Bearer not-to-be-shown"}
    assert result.manifest.samples == 2 and list(result.rejects) == ["the synthesizer refused it"]
    assert abs(len(ShardDataset(tmp_path / "set")[0].waveform) - 16000) < 400
    assert "not-to-be-shown" not in "".join(p.read_text() for p in (tmp_path / "set").glob("*.json*"))


def test_what_an_endpoint_spoke_is_not_asked_for_again(tmp_path: Path) -> None:
    """Would catch an endpoint that dies in the middle of a shard and takes with it what was spoken, and paid for."""
    questions = write_questions(tmp_path / "q.jsonl", 34)
    lasting = [1000]  # requests up to which the endpoint fails after its first 24
    with OpenAIServer(
        lambda requests: Reply(status=503) if 24 < len(requests) <= lasting[0] else speak(requests)
    ) as server:
        synthesizer = SynthesizerConfig("openai", ("amy",), url=server.url, patience=ONE_TRY)
        config = SpokenSetConfig(str(questions), synthesizer=synthesizer)
        with pytest.raises(CordError, match=r"does not serve .* is kept"):
            make_spoken_set(config, tmp_path / "set")
        assert len(list((tmp_path / "set").glob(".shard-000000.part-*.receipt.json"))) == 2
        lasting[0] = 0
        before = len(server.requests)
        result = make_spoken_set(config, tmp_path / "set")
        assert len(server.requests) == before + 14, "ten and ten were kept"
    dataset = ShardDataset(tmp_path / "set")
    assert dataset.ids == [f"q{i}" for i in range(34)] and not result.rejects
    assert sorted(p.name for p in (tmp_path / "set").iterdir() if p.name.startswith(".")) == []


def test_an_endpoint_that_stumbles_over_one_text(tmp_path: Path) -> None:
    """Would catch one text that the server always fails at and that stops the whole set for ever."""
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"Say {word}."}) + "\n" for word in ("one", "stumble", "two")))
    with OpenAIServer(speak) as server:
        synthesizer = SynthesizerConfig("openai", ("amy",), url=server.url, patience=ONE_TRY, concurrency=1)
        result = make_spoken_set(SpokenSetConfig(str(file), max_rejects=0.5, synthesizer=synthesizer), tmp_path / "set")
    assert result.manifest.samples == 2 and list(result.rejects.values()) == [1]


def test_an_endpoint_that_is_away_keeps_what_is_made(tmp_path: Path) -> None:
    """Would catch a crash without advice."""
    config = SynthesizerConfig("openai", ("amy",), url="http://127.0.0.1:9/v1", patience=ONE_TRY)
    with pytest.raises(CordError, match=r"does not serve .* is kept"):
        make_spoken_set(
            SpokenSetConfig(str(write_questions(tmp_path / "q.jsonl", 2)), synthesizer=config), tmp_path / "set"
        )


def test_round_trip() -> None:
    """Would catch a wrong word count, and numbers that count as wrong for being written in digits."""
    assert word_error_rate("what is 21 plus 2", "What is twenty one plus two?") == 0.0
    assert word_error_rate("one two three four", "one too four") == 0.5
    assert word_error_rate("今天天气很好", "今天天气不好") == pytest.approx(1 / 6)  # by characters
    with OpenAIServer(speak) as server:
        client = OpenAIClient(server.url)
        assert Transcriber(client, "whisper").transcribe(np.full(1600, 0.1, np.float32)) == "what is nine"
        assert b"RIFF" in server.requests[0].body and b"whisper" in server.requests[0].body
        client.close()


def test_what_is_misheard_is_left_out(tmp_path: Path) -> None:
    """Would catch a round trip that is made and not counted."""
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "What is nine?"}\n{"question": "What is ten?"}\n')
    with OpenAIServer(speak) as server:
        config = SpokenSetConfig(str(file), max_rejects=0.5, quality=QualityConfig(asr_url=server.url))
        result = make_spoken_set(config, tmp_path / "set")
    assert result.manifest.samples == 1 and result.rejects == {"it is misheard": 1}
