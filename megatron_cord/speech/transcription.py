"""The round trip: a speech recognizer transcribes each recording, and the share of wrong words is its quality."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import OpenAIClient
from megatron_cord.speech.verbalization import UnspeakableError, verbalize


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


def word_error_rate(reference: str, transcript: str) -> float:
    """Return wrong, missing and additional words per word of the reference; numbers are compared as words."""
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
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold())
