"""What a recording must be like; others are left out of a set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE

_SILENT = 0.01  # amplitude, and share of a recording's peak
_FRAME = 400  # samples: 25 ms


@dataclass(frozen=True)
class QualityConfig:
    """Bounds of a recording, and the recognizer that checks it.

    Attributes:
        max_characters: of a question.
        min_seconds, max_seconds: of a recording; Whisper's window is 30 s.
        max_silence: largest share of silent 25 ms frames.
        max_clipping: largest share of samples at the peak.
        min_loudness: mean power of its sounding frames, dB below a full-scale square wave; a click over a whisper has
            less.
        asr_url: an OpenAI-compatible endpoint that transcribes each recording; None leaves the round trip out.
        asr_model: sent to it.
        max_word_error_rate: of the round trip.
    """

    max_characters: int = 2000
    min_seconds: float = 0.2
    max_seconds: float = 30.0
    max_silence: float = 0.7
    max_clipping: float = 0.05  # a pure tone has 0.03
    min_loudness: float = -35.0
    asr_url: str | None = None
    asr_model: str = "whisper-1"
    max_word_error_rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_seconds < self.max_seconds:
            raise CordError(
                f"recordings from {self.min_seconds} to {self.max_seconds} s: min_seconds must be the smaller one"
            )
        if self.max_characters < 1 or self.max_word_error_rate < 0:
            raise CordError("max_characters must be at least 1, and max_word_error_rate not negative")


def recording_fault(waveform: np.ndarray, quality: QualityConfig, *, min_peak: float = _SILENT) -> str | None:
    """Return what is wrong with a recording, float32 [samples] at 16 kHz, or None; with a lower peak it is silent."""
    seconds = len(waveform) / SAMPLING_RATE
    if not np.isfinite(waveform).all():
        return "its recording is not finite"
    if seconds < quality.min_seconds:
        return f"its recording is too short ({seconds:.2f} s)"
    if seconds > quality.max_seconds:
        return f"its recording is too long ({seconds:.2f} s)"
    size = np.abs(waveform)
    peak = float(size.max())
    frames = size[: len(size) // _FRAME * _FRAME].reshape(-1, _FRAME)
    sounding = frames.max(axis=1, initial=0.0) >= _SILENT * peak
    if peak < min_peak or float((~sounding).mean()) > quality.max_silence:
        return "its recording is mostly silent"
    if float((size > 0.999 * peak).mean()) > quality.max_clipping:
        return "its recording is clipped"
    power = float(np.mean(np.square(waveform[: len(frames) * _FRAME].reshape(-1, _FRAME)[sounding], dtype=np.float64)))
    if (loudness := 10.0 * np.log10(max(power, 1e-12))) < quality.min_loudness:
        return f"its recording is too quiet ({loudness:.0f} dB)"
    return None
