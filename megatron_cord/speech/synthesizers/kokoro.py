"""Kokoro-82M, the paper's synthesizer, on the CPU from files of its ONNX export (package kokoro-onnx).

Kokoro and CosyVoice also have servers: see `endpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, UtteranceRefusedError, polish


class KokoroSynthesizer:
    """Voices whose name begins with "b" speak British English, all others American.

    Equal arguments need not give equal recordings.

    Args:
        directory: with one .onnx and one .bin or .npz.

    Raises:
        CordError: the package or one of the files is missing, or they are not Kokoro's.
    """

    def __init__(self, directory: str) -> None:
        try:
            from kokoro_onnx import Kokoro
        except ImportError:
            raise CordError(
                "the backend kokoro needs the package kokoro-onnx; pip install megatron_cord[kokoro]"
            ) from None
        files = list(Path(directory).glob("*")) if Path(directory).is_dir() else []
        models = [str(f) for f in files if f.suffix == ".onnx"]
        voices = [str(f) for f in files if f.suffix in {".bin", ".npz"}]
        if len(models) != 1 or len(voices) != 1:
            raise CordError(
                f"{directory}: Kokoro's directory must hold one .onnx and one .bin or .npz, "
                f"not {len(models)} and {len(voices)}"
            )
        try:
            self._kokoro = Kokoro(models[0], voices[0])
        except Exception as error:  # onnxruntime raises types of its own
            raise CordError(f"{directory}: Kokoro does not start ({str(error)[:200]})") from error

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """Implement ``SpeechSynthesizer.speak``; a voice's pitch cannot be changed."""
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> np.ndarray:
        voice = utterance.voice
        if voice.pitch != 1.0:
            raise CordError(f"voice {voice.name}: Kokoro cannot change the pitch; leave it at 1")
        if not 0.5 <= voice.speed <= 2.0:
            raise CordError(f"voice {voice.name}: speed {voice.speed}; Kokoro speaks at 0.5 to 2")
        if voice.name not in (known := self._kokoro.get_voices()):
            raise CordError(f"Kokoro has no voice {voice.name!r}; it has {', '.join(known[:8])} …")
        language = "en-gb" if voice.name.startswith("b") else "en-us"
        try:
            recording, rate = self._kokoro.create(utterance.text, voice=voice.name, speed=voice.speed, lang=language)
        except ValueError as error:
            raise UtteranceRefusedError(str(error)[:200]) from error
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)
