"""Recordings as others keep them, of any usual format, rate and number of channels, as mono audio at 16 kHz.

Shards hold one plain format (``wav``); benchmarks come as MP3, FLAC or WAV at 24 or 44.1 kHz. libsndfile reads them
(package soundfile, extra ``speech``). What it simplifies: channels are averaged, and a recording is in memory as a
whole, so its length is bounded.
"""

from __future__ import annotations

import io
from math import gcd

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.errors import CordError

_LONGEST_SECONDS = 3600.0
_LARGEST_FILTER = 2000  # phases; rates that share next to no factor with 16 kHz would need thousands of filters


def decode_audio(content: bytes, where: str) -> np.ndarray:
    """Decode the audio of a file.

    Args:
        content: of the file.
        where: names it in errors.

    Returns:
        float32 [samples] in [-1, 1], mono, 16 kHz.

    Raises:
        CordError: not a recording, damaged, empty, without a finite sample, or longer than an hour; or soundfile is
            missing.
    """
    try:
        import soundfile
    except ImportError:
        raise CordError(
            f"{where}: reading recordings needs the package soundfile; pip install megatron_cord[speech]"
        ) from None
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not 4000 <= rate <= 384000 or rate // gcd(rate, SAMPLING_RATE) > _LARGEST_FILTER:
                raise CordError(f"{where}: a recording at {rate} Hz; usual rates from 4 to 384 kHz can be read")
            if file.frames > _LONGEST_SECONDS * rate:
                raise CordError(f"{where}: {file.frames / rate:.0f} s of audio, more than an hour; cut it")
            channels = file.read(int(_LONGEST_SECONDS * rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        raise CordError(f"{where}: not a recording that can be read ({str(error)[:120]})") from None
    audio = channels.mean(axis=1)
    if len(audio) == 0:
        raise CordError(f"{where}: the recording has no samples")
    if not np.isfinite(audio).all():
        raise CordError(f"{where}: the recording holds NaN or infinite samples")
    waveform: np.ndarray = np.clip(resample(audio, rate, SAMPLING_RATE), -1.0, 1.0)
    return waveform
