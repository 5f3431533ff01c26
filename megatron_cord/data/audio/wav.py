"""WAV files as shards hold them: 16-bit PCM, mono, 16 kHz. Anything else is refused, not converted in silence.

What it simplifies: no other encoding, and no chunk but the format and the data.
"""

from __future__ import annotations

import io
import struct
import wave
from typing import BinaryIO

import numpy as np

from megatron_cord.errors import CordError

SAMPLING_RATE = 16000
_ADVICE = f"convert it to 16-bit PCM, mono, {SAMPLING_RATE} Hz"


def encode_wav(waveform: np.ndarray) -> bytes:
    """Encode float samples [samples] in [-1, 1] at 16 kHz as a WAV file.

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


def encode_float_wav(waveform: np.ndarray) -> bytes:
    """Encode float samples [samples] at 16 kHz bit by bit, for a server that must get the trainer's own samples."""
    samples = waveform.astype("<f4").tobytes()
    form = struct.pack("<IHHIIHH", 16, 3, 1, SAMPLING_RATE, 4 * SAMPLING_RATE, 4, 32)  # 3: IEEE floating-point
    return (
        b"RIFF"
        + struct.pack("<I", 20 + len(form) + len(samples))
        + b"WAVEfmt "
        + form
        + b"data"
        + struct.pack("<I", len(samples))
        + samples
    )


def check_wav(file: BinaryIO, size: int, where: str) -> int:
    """Read the header at the file's position, without the audio; return how many samples it has.

    Args:
        file: a binary file; the WAV may lie in the middle of it.
        size: bytes of the WAV.
        where: names the file and the sample in errors.

    Raises:
        CordError: when it is not a WAV file as described above, or too small for its audio.
    """
    with _open_wav(file, where) as header:
        samples = header.getnframes()
    _check_length(samples, size, where)
    return samples


def decode_wav(content: bytes, where: str) -> np.ndarray:
    """Decode the audio of a WAV file.

    Returns:
        float32 [samples] in [-1, 1], at 16 kHz.

    Raises:
        CordError: see ``check_wav``.
    """
    with _open_wav(io.BytesIO(content), where) as recording:
        count = recording.getnframes()
        data = recording.readframes(count)
    _check_length(count, len(data), where)
    samples = np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32767.0)
    waveform: np.ndarray = np.maximum(samples, np.float32(-1.0))
    return waveform


def _check_length(samples: int, size: int, where: str) -> None:
    if 2 * samples > size:
        raise CordError(f"{where}: audio is cut off: {size} bytes for {samples} samples; make the file again")


def _open_wav(file: BinaryIO, where: str) -> wave.Wave_read:
    try:
        recording = wave.Wave_read(file)
    except (
        wave.Error,
        EOFError,
        RuntimeError,
    ) as error:  # the module raises a bare RuntimeError for some damaged headers
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
