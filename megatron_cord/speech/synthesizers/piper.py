"""Piper's neural voices, on the CPU (package piper-tts).

A voice is the path of its .onnx file, and how it is spoken may stand behind it: `joe.onnx+pitch=1.1+noise=0.5`. So one
file gives several voices, as variants do with espeak-ng.

What it simplifies: another pitch is a recording that is played faster or slower, so that formants move with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, UtteranceRefusedError, polish

_NAME = re.compile(r"(?P<file>.+?\.onnx)(?P<settings>(?:\+[^+/]*)*)", re.DOTALL)
#: Settings behind a voice's file, with the least and the largest value.
_RANGES = {"pitch": (0.5, 2.0), "noise": (0.0, 2.0), "rhythm": (0.0, 2.0), "speaker": (0, 10_000)}
_RATE_GRID = 50  # Hz: rates are rounded to it, so that filters of the resampling are few


@dataclass(frozen=True)
class PiperVoice:
    """A voice as it is named.

    Attributes:
        file: the .onnx file, its .onnx.json beside it.
        pitch: 1 is the voice's own.
        noise: how much the sound varies; None is the voice's own.
        rhythm: how much the lengths of sounds vary; None is the voice's own.
        speaker: of a file with several; None is the first.
    """

    file: str
    pitch: float = 1.0
    noise: float | None = None
    rhythm: float | None = None
    speaker: int | None = None

    @classmethod
    def named(cls, name: str) -> PiperVoice:
        """Read a name.

        Raises:
            CordError: it names no .onnx file, a setting that there is not, or a value out of its range.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise CordError(f"{name}: no such voice; give the path of a Piper voice (.onnx, its .onnx.json beside it)")
        settings: dict[str, Any] = {}
        for setting in match["settings"].split("+")[1:]:
            key, _, text = setting.partition("=")
            low, high = _RANGES.get(key, (0, -1))
            try:
                value = type(low)(text)
            except ValueError:
                value = -1
            if not low <= value <= high or key in settings:
                known = ", ".join(f"{key}={least:g}..{most:g}" for key, (least, most) in _RANGES.items())
                raise CordError(f"voice {name}: {setting!r} cannot be set; behind the file may stand +{known}")
            settings[key] = value
        return cls(match["file"], **settings)


def voice_label(name: str) -> str:
    """Return the name by which a voice is shown: that of its file, without folder and ending, with its settings."""
    voice = PiperVoice.named(name)
    return Path(voice.file).stem + name.removeprefix(voice.file)


class PiperSynthesizer:
    """Each voice is loaded once. Equal arguments need not give equal recordings.

    Raises:
        CordError: the package piper-tts is missing.
    """

    def __init__(self) -> None:
        try:
            import piper
        except ImportError:
            raise CordError("the backend piper needs the package piper-tts; pip install megatron_cord[piper]") from None
        self._piper = piper
        self._voices: dict[str, piper.PiperVoice] = {}

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """Implement ``SpeechSynthesizer.speak``."""
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> np.ndarray:
        chosen = PiperVoice.named(utterance.voice.name)
        pitch = chosen.pitch * utterance.voice.pitch
        settings = self._piper.SynthesisConfig(
            speaker_id=chosen.speaker,
            length_scale=pitch / utterance.voice.speed,
            noise_scale=chosen.noise,
            noise_w_scale=chosen.rhythm,
        )
        chunks = list(self._loaded(chosen).synthesize(utterance.text, syn_config=settings))
        if not chunks:
            raise UtteranceRefusedError("the voice made no sound of it")
        recording = np.concatenate([chunk.audio_float_array for chunk in chunks])
        rate = chunks[0].sample_rate
        if pitch != 1.0:
            rate = round(rate * pitch / _RATE_GRID) * _RATE_GRID
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)

    def _loaded(self, chosen: PiperVoice) -> Any:
        """Return the voice of a file."""
        if chosen.file not in self._voices:
            if not Path(chosen.file).is_file():
                raise CordError(
                    f"{chosen.file}: no such voice; give the path of a Piper voice (.onnx, its .onnx.json beside it)"
                )
            self._voices[chosen.file] = self._piper.PiperVoice.load(chosen.file)
        voice = self._voices[chosen.file]
        if chosen.speaker is not None and chosen.speaker >= voice.config.num_speakers:
            raise CordError(
                f"{chosen.file} has {voice.config.num_speakers} speakers, numbered from 0; there is no {chosen.speaker}"
            )
        return voice
