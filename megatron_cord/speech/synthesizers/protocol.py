"""The interface of a synthesizer: utterances in, recordings out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_cord.errors import CordError

SAMPLING_RATE = 16000
_PEAK = 0.9
_SILENCE = 0.01  # of the peak
_MARGIN_SECONDS = 0.02


@dataclass(frozen=True)
class Voice:
    """A voice with its speed and pitch.

    Attributes:
        name: as the synthesizer calls it; for espeak-ng a language with an optional variant, "en-us+f2".
        speed: 1 is the synthesizer's normal speed, 2 twice as fast.
        pitch: 1 is the voice's normal pitch; espeak-ng takes up to 1.98.
    """

    name: str
    speed: float = 1.0
    pitch: float = 1.0


@dataclass(frozen=True)
class Utterance:
    """A text with the voice that speaks it."""

    text: str
    voice: Voice


class UtteranceRefusedError(CordError):
    """The synthesizer does not speak this text; it speaks others."""


class SpeechSynthesizer(Protocol):
    """Turns text into speech."""

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """Return one recording for each utterance: float32 [samples], peak 0.9, mono, 16 kHz.

        Raises:
            UtteranceRefusedError: for a text without anything to say.
            CordError: for an unknown voice.
        """
        ...


def polish(waveform: np.ndarray, utterance: Utterance) -> np.ndarray:
    """Scale a recording to peak 0.9 and trim it to 20 ms of silence at either end."""
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak == 0.0:
        raise UtteranceRefusedError(
            f"voice {utterance.voice.name!r} made no sound of the text {utterance.text!r}; "
            "write it in the voice's language"
        )
    loud = np.flatnonzero(np.abs(waveform) > _SILENCE * peak)
    margin = round(_MARGIN_SECONDS * SAMPLING_RATE)
    return waveform[max(0, loud[0] - margin) : loud[-1] + 1 + margin] * np.float32(_PEAK / peak)
