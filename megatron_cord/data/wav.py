"""WAV files as shards hold them: 16-bit PCM, mono, 16 kHz. Anything else is refused, not converted in silence.

What it simplifies: no other encoding, and no chunk but the format and the data.
"""

from __future__ import annotations

import io
import wave
from typing import BinaryIO

import numpy as np

from megatron_cord.errors import CordError

SAMPLING_RATE = 16000
_ADVICE = f"convert it to 16-bit PCM, mono, {SAMPLING_RATE} Hz"


def encode_wav(waveform: np.ndarray) -> bytes:
    """A WAV file of float samples [samples] in [-1, 1] at 16 kHz.

    Raises:
        ValueError: when the waveform is not one-dimensional, empty, not finite, or outside [-1, 1].
    """
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"audio of shape {waveform.shape}; it must be [samples], at least one")
    if not np.isfinite(waveform).all() or np.abs(waveform).max() > 1.0:
        raise ValueError("audio outside [-1, 1]")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(np.round(waveform * 32767.0).astype("<i2").tobytes())
    return buffer.getvalue()


def check_wav(file: BinaryIO, where: str) -> int:
    """Reads the header at the file's position, and leaves the position behind it.

    Args:
        file: a binary file; the WAV may lie in the middle of it.
        where: names the file and the sample in errors.

    Returns:
        How many samples the header announces, at least 1.

    Raises:
        CordError: when it is not a WAV file as described above.
    """
    with _open_wav(file, where) as header:
        return header.getnframes()


def decode_wav(file: BinaryIO, where: str) -> np.ndarray:
    """Like ``check_wav``, but reads the audio too.

    Returns:
        float32 [samples] in [-1, 1].

    Raises:
        CordError: also when the audio ends before the header's number of samples.
    """
    with _open_wav(file, where) as recording:
        count = recording.getnframes()
        data = recording.readframes(count)
    if len(data) != 2 * count:
        raise CordError(f"{where}: audio is cut off after {len(data) // 2} of {count} samples; make the file again")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32767.0)


def _open_wav(file: BinaryIO, where: str) -> wave.Wave_read:
    try:
        recording = wave.Wave_read(file)
    except (wave.Error, EOFError) as error:
        raise CordError(f"{where}: not a PCM WAV file ({str(error) or 'it ends too early'}); {_ADVICE}") from error
    if recording.getsampwidth() != 2:
        raise CordError(f"{where}: audio has {8 * recording.getsampwidth()} bits a sample; {_ADVICE}")
    if recording.getnchannels() != 1:
        raise CordError(f"{where}: audio has {recording.getnchannels()} channels; {_ADVICE}")
    if recording.getframerate() != SAMPLING_RATE:
        raise CordError(f"{where}: audio at {recording.getframerate()} Hz; {_ADVICE}")
    if recording.getnframes() == 0:
        raise CordError(f"{where}: audio has no samples; remove the sample or record it again")
    return recording
