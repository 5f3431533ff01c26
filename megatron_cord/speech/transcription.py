"""The round trip: a speech recognizer transcribes each recording, and the share of wrong words is its quality."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import numpy as np

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import OpenAIClient, Patience, RequestRefusedError
from megatron_cord.speech.verbalization import UnspeakableError, verbalize

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # kana and Han
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W_{_UNSPACED}]+)?")


class Transcriber:
    """A server with OpenAI's `POST /audio/transcriptions`.

    Args:
        client: of the server.
        model: sent to it.
    """

    def __init__(self, client: OpenAIClient, model: str) -> None:
        self._client, self._model = client, model

    def transcribe(self, waveform: np.ndarray) -> str:
        """Return the words in float32 [samples] at 16 kHz.

        Raises:
            CordError: the server is away or answers something else than a transcript.
        """
        reply = self._client.post(
            "audio/transcriptions",
            parse=bytes,
            data={"model": self._model},
            files={"file": ("question.wav", encode_wav(waveform), "audio/wav")},
        )
        try:
            text = json.loads(reply)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise CordError(f"{self._client.url}/audio/transcriptions answered no transcript ({reply[:200]!r})")
        return text


@contextlib.contextmanager
def open_transcriber(url: str | None, model: str, api_key_env: str, patience: Patience) -> Iterator[Transcriber | None]:
    """Enter with the transcriber at an address, or None for none; its connections end with the block."""
    if url is None:
        yield None
        return
    with contextlib.closing(OpenAIClient(url, api_key_env=api_key_env, patience=patience)) as client:
        yield Transcriber(client, model)


def transcription_fault(
    transcriber: Transcriber, text: str, recording: np.ndarray, max_word_error_rate: float
) -> str | None:
    """Return that a recording, float32 [samples] at 16 kHz, is misheard or refused; else None.

    Raises:
        EndpointError: the server is away.
    """
    try:
        transcript = transcriber.transcribe(recording)
    except RequestRefusedError as error:
        return f"the recognizer refused it ({error})"
    rate = word_error_rate(text, transcript)
    if rate <= max_word_error_rate:
        return None
    return f"it is misheard ({rate:.0%} of the words wrong: {transcript[:80]!r})"


def word_error_rate(reference: str, transcript: str) -> float:
    """Return wrong, missing and additional words per word of the reference; numbers are compared as words.

    Chinese and Japanese, which are written without spaces, are compared by characters.
    """
    expected, words = _words(reference), _words(transcript)
    if not expected:
        raise ValueError("the reference has no words")
    distances = np.arange(len(words) + 1)
    for row, expected_word in enumerate(expected, 1):
        previous, distances = distances, np.empty_like(distances)
        distances[0] = row
        for column, word in enumerate(words, 1):
            distances[column] = min(
                previous[column] + 1, distances[column - 1] + 1, previous[column - 1] + (word != expected_word)
            )
    return float(distances[-1]) / len(expected)


def _words(text: str) -> list[str]:
    with contextlib.suppress(UnspeakableError):  # a transcript may be any text; it is then compared as it stands
        text = verbalize(text)
    return _WORD.findall(text.casefold())
