"""The round trip: a speech recogniser writes down what was spoken, and the share of wrong words tells whether it can be understood."""

from __future__ import annotations

import re

import numpy as np

from megatron_cord.data.wav import encode_wav
from megatron_cord.errors import CordError
from megatron_cord.speech.endpoint import Endpoint
from megatron_cord.speech.spoken_text import Unspeakable, spoken


class Transcriber:
    """A server with OpenAI's `POST /audio/transcriptions`.

    Args:
        endpoint: where it is.
        model: that it is asked for.
    """

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint, self._model = endpoint, model

    def transcribe(self, waveform: np.ndarray) -> str:
        """What is said in float32 [samples] at 16 kHz.

        Raises:
            CordError: the server is away or answers something else than a transcript.
        """
        response = self._endpoint.post(
            "audio/transcriptions",
            data={"model": self._model},
            files={"file": ("question.wav", encode_wav(waveform), "audio/wav")},
        )
        try:
            text = response.json()["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise CordError(
                f"{self._endpoint.url}/audio/transcriptions answered no transcript ({response.text[:200]!r})"
            )
        return text


def word_error_rate(said: str, heard: str) -> float:
    """Wrong, missing and additional words per word said; numbers count as the words they are read as."""
    reference, words = _words(said), _words(heard)
    if not reference:
        raise ValueError("nothing was said")
    distances = np.arange(len(words) + 1)
    for number, expected in enumerate(reference, 1):
        previous, distances = distances, np.empty_like(distances)
        distances[0] = number
        for place, word in enumerate(words, 1):
            distances[place] = min(
                previous[place] + 1, distances[place - 1] + 1, previous[place - 1] + (word != expected)
            )
    return float(distances[-1]) / len(reference)


def _words(text: str) -> list[str]:
    try:
        text = spoken(text)
    except Unspeakable:
        pass  # a recogniser may write anything; it is compared as it stands
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold())
