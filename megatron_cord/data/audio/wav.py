"""WAV files: written as shards hold them (16-bit PCM, mono, 16 kHz), and found in files of any other program.

A WAV file is a list of chunks, of which the format and the data matter. A program that writes to a pipe cannot know the
length of its data when it writes the header, and leaves 0 or a huge number there; then the data is all that follows.
"""

from __future__ import annotations

import io
import struct
import wave
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megatron_cord.errors import CordError

SAMPLING_RATE = 16000
#: Bytes a sample by the format's tag: integers, floats, A-law and μ-law. Any bytes are audio in them.
_WIDTHS = {1: (1, 2, 3, 4), 3: (4, 8), 6: (1,), 7: (1,)}
_EXTENSIBLE = 0xFFFE  # the tag stands further on
_UNKNOWN_LENGTH = 0x7FFF0000  # programs that do not know the length write this or more
_DESCRIPTION = struct.Struct("<HHIIHH")  # tag, channels, rate, bytes a second, bytes a frame, bits a sample


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


@dataclass(frozen=True)
class WavLayout:
    """Where the audio lies in a WAV file, and how it is encoded.

    Attributes:
        tag: of the format: 1 integers, 3 floats, 6 A-law, 7 μ-law.
        channels: in turn, sample by sample.
        rate: Hz.
        width: bytes of a sample of one channel.
        offset: of the first sample, in bytes from the start of the file.
        frames: samples of each channel.
    """

    tag: int
    channels: int
    rate: int
    width: int
    offset: int
    frames: int

    def rewrite(self, content: bytes) -> bytes:
        """Return the file with the shortest header: its length right and no other chunk."""
        frame = self.channels * self.width
        data = content[self.offset : self.offset + self.frames * frame]
        form = _DESCRIPTION.pack(self.tag, self.channels, self.rate, self.rate * frame, frame, 8 * self.width)
        sizes = [
            struct.pack("<I", min(size, 0xFFFFFFFF)) for size in (20 + len(form) + len(data), len(form), len(data))
        ]
        return b"RIFF" + sizes[0] + b"WAVEfmt " + sizes[1] + form + b"data" + sizes[2] + data


def find_wav_audio(file: BinaryIO, size: int, where: str) -> WavLayout | None:
    """Read the chunks of a WAV file from the file's position on, but not its audio.

    Args:
        file: a binary file; the WAV may lie in the middle of it.
        size: bytes of the WAV.
        where: names the recording in errors.

    Returns:
        None for what is no WAV file, or one of an encoding whose length its bytes do not tell.

    Raises:
        CordError: the header is damaged, or there is less audio than it says.
    """
    start = file.tell()
    head = file.read(min(12, size))
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    form, place = b"", 12
    while place + 8 <= size:
        file.seek(start + place)
        name, length = struct.unpack("<4sI", file.read(8))
        place += 8
        if name == b"fmt ":
            form = file.read(min(length, 40, size - place))
        elif name == b"data":
            return _layout(form, place, _data_length(file, length, size - place, where), where)
        place += length + length % 2  # chunks begin at even places
    raise CordError(f"{where}: not a recording that can be read (a WAV file that ends before its audio)")


def _data_length(file: BinaryIO, length: int, rest: int, where: str) -> int:
    """Return the bytes of the data chunk at whose beginning the file is."""
    if length == 0 and not _are_chunks(file, rest):
        return rest
    if length <= rest:
        return length
    if length >= _UNKNOWN_LENGTH:
        return rest
    raise CordError(f"{where}: audio is cut off: {rest} of {length} bytes; make the file again")


def _are_chunks(file: BinaryIO, rest: int) -> bool:
    """Return whether the next bytes are chunks up to the file's end, such as a title behind a recording of nothing."""
    start, place = file.tell(), 0
    while place + 8 <= rest:
        file.seek(start + place)
        name, length = struct.unpack("<4sI", file.read(8))
        if not name.isascii() or not name.decode("ascii").isprintable():
            return False
        place += 8 + length + length % 2
    return place in (rest, rest + 1)


def _layout(form: bytes, offset: int, length: int, where: str) -> WavLayout | None:
    if len(form) < _DESCRIPTION.size:
        raise CordError(f"{where}: not a recording that can be read (a WAV file without its format)")
    tag, channels, rate, _, frame, _ = _DESCRIPTION.unpack(form[: _DESCRIPTION.size])
    if tag == _EXTENSIBLE and len(form) >= 26:
        tag = int.from_bytes(form[24:26], "little")
    if tag not in _WIDTHS:
        return None
    if not 1 <= channels <= 64 or frame % channels or frame // channels not in _WIDTHS[tag]:
        raise CordError(
            f"{where}: not a recording that can be read (a WAV file of {channels} channels and {frame} bytes for a "
            "sample of all)"
        )
    return WavLayout(tag, channels, rate, frame // channels, offset, length // frame)
