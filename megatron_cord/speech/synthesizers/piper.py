"""Piper's neural voices, on the CPU (package piper-tts)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, UtteranceRefusedError, polish


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
        """Implement ``SpeechSynthesizer.speak``; a voice's pitch cannot be changed."""
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> np.ndarray:
        name = utterance.voice.name
        if utterance.voice.pitch != 1.0:
            raise CordError(f"voice {name}: Piper cannot change the pitch; leave it at 1")
        if name not in self._voices:
            if not Path(name).is_file():
                raise CordError(
                    f"{name}: no such voice; give the path of a Piper voice (.onnx, its .onnx.json beside it)"
                )
            self._voices[name] = self._piper.PiperVoice.load(name)
        settings = self._piper.SynthesisConfig(length_scale=1.0 / utterance.voice.speed)
        chunks = list(self._voices[name].synthesize(utterance.text, syn_config=settings))
        if not chunks:
            raise UtteranceRefusedError("the voice made no sound of it")
        recording = np.concatenate([chunk.audio_float_array for chunk in chunks])
        return polish(resample(recording, chunks[0].sample_rate, SAMPLING_RATE), utterance)
