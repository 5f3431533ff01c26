"""Recordings of any usual format, rate and number of channels, as mono audio at 16 kHz: the one way in for audio.

libsndfile reads them (WAV, FLAC, MP3, Ogg Vorbis, Opus, AIFF …), soxr changes their rate. 16-bit samples are divided
by 32767, as shards are written, so what was written is read back; at 16 kHz nothing else is done to them.

What it simplifies: channels are averaged, and a recording is in memory as a whole, so its length is bounded. A cut is
found where the format tells: by a length in the header, or a frame that breaks off.
"""

from __future__ import annotations

import io
import re
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from megatron_cord.data.audio.wav import SAMPLING_RATE, WavLayout, find_wav_audio
from megatron_cord.errors import CordError

_LONGEST_SECONDS = 3600
_RATES = (4000, 384000)
_HIGHEST = 100.0  # a float beyond is damage, or an integer that was not scaled; a loud recording passes 1 by little
_BLOCK = 1 << 18  # samples of all channels that are read together
_MOST_FRAMES = 1 << 62  # beyond it libsndfile does not know the length
_MP3_SLACK = 2304  # frames by which an MP3's header may differ from what is decoded: two of its own frames


def decode_audio(content: bytes, where: str) -> np.ndarray:
    """Decode the audio of a file.

    Args:
        content: of the file.
        where: names it in errors.

    Returns:
        float32 [samples] in [-1, 1], mono, 16 kHz.

    Raises:
        CordError: not a recording, damaged, cut off, empty, without a finite sample, of an odd rate, or longer than an
            hour.
    """
    audio, rate = decode_recording(content, where)
    if rate != SAMPLING_RATE:
        audio = soxr.resample(audio, rate, SAMPLING_RATE)
    if len(audio) == 0:
        raise CordError(f"{where}: the recording has no samples")
    waveform: np.ndarray = np.clip(audio, np.float32(-1.0), np.float32(1.0))
    return waveform


def decode_recording(content: bytes, where: str) -> tuple[np.ndarray, int]:
    """Decode the audio of a file as `decode_audio`, at its own rate.

    Returns:
        float32 [samples], mono, which may reach a little beyond [-1, 1], and the rate in Hz.
    """
    layout = find_wav_audio(io.BytesIO(content), len(content), where)
    if layout is not None:
        _check_length(layout, where)
        content = layout.rewrite(content)
    else:
        _refuse_cut(content, where)
    try:
        with _Recording(_Content(content)) as file:
            rate, limit = int(file.samplerate), _most_frames(file.samplerate, where)
            known = file.frames if file.frames < _MOST_FRAMES else None
            if known is not None and known > limit:
                raise _too_long(known / rate, where)
            kind, mp3 = ("int16" if file.subtype == "PCM_16" else "float32"), file.format == "MP3"
            blocks = _read_blocks(file, kind, limit, where)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        reason = re.sub(r"<[^>]*_Content[^>]*>", "it", " ".join(str(error).split()))[:120]
        raise CordError(f"{where}: not a recording that can be read ({reason})") from None
    audio = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(audio) == 0:
        raise CordError(f"{where}: the recording has no samples")
    if known is not None and len(audio) < known - (_MP3_SLACK if mp3 else 0):
        raise CordError(f"{where}: audio is cut off: {len(audio)} of {known} samples; make the file again")
    if not np.isfinite(audio).all():
        raise CordError(f"{where}: the recording holds NaN or infinite samples")
    if (highest := float(np.abs(audio).max())) > _HIGHEST:
        raise CordError(f"{where}: the recording has samples up to {highest:.3g}; floats must lie between -1 and 1")
    return audio, rate


def count_samples(file: BinaryIO, size: int, where: str) -> int:
    """Check a recording that begins at the file's position; return how many samples `decode_audio` makes of it.

    A WAV file of integers is checked by its header, for its samples cannot be wrong. Others are decoded.

    Args:
        file: a binary file; the recording may lie in the middle of it.
        size: bytes of the recording.
        where: names it in errors.

    Raises:
        CordError: what `decode_audio` would raise.
    """
    start = file.tell()
    layout = find_wav_audio(file, size, where)
    if layout is None or layout.tag == 3:  # floats may be no numbers
        file.seek(start)
        return len(decode_audio(file.read(size), where))
    _check_length(layout, where)
    samples = (2 * layout.frames * SAMPLING_RATE + layout.rate) // (2 * layout.rate)
    if samples == 0:
        raise CordError(f"{where}: the recording has no samples")
    return samples


class _Content(io.BytesIO):
    """A file in which seeking before its beginning goes nowhere; an error there would be printed, not raised."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


class _Recording(soundfile.SoundFile):  # type: ignore[misc]  # the package has no types
    """A file read from its beginning to its end: seeking fails in a FLAC file that does not know its length."""

    def seekable(self) -> bool:
        return False


def _read_blocks(file: _Recording, kind: str, limit: int, where: str) -> list[np.ndarray]:
    """Return the mean of the channels as float32, in blocks."""
    size = max(1, _BLOCK // file.channels)
    blocks: list[np.ndarray] = []
    while len(block := file.read(size, dtype=kind, always_2d=True)):
        if kind == "int16":
            block = block.astype(np.float32) / np.float32(32767.0)
        with np.errstate(invalid="ignore", over="ignore"):  # infinite samples are refused in the end
            blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
        if size * (len(blocks) - 1) + len(block) > limit:
            raise _too_long(limit / file.samplerate, where)
    return blocks


def _most_frames(rate: int, where: str) -> int:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise CordError(f"{where}: a recording at {rate} Hz; rates from 4 to 384 kHz can be read")
    return _LONGEST_SECONDS * rate


def _check_length(layout: WavLayout, where: str) -> None:
    if layout.frames > _most_frames(layout.rate, where):
        raise _too_long(layout.frames / layout.rate, where)


def _too_long(seconds: float, where: str) -> CordError:
    return CordError(f"{where}: {seconds:.0f} s of audio, an hour at most can be read; cut it")


def _refuse_cut(content: bytes, where: str) -> None:
    """Refuse a file of Ogg or AIFF that is shorter than it says, of which libsndfile reads the rest."""
    if content[:4] == b"OggS":
        page = content.rfind(b"OggS")
        sizes = content[page + 27 : page + 27 + content[page + 26]] if page + 26 < len(content) else b""
        whole = page + 27 + (content[page + 26] + sum(sizes) if page + 26 < len(content) else 0)
    elif content[:4] == b"FORM":
        whole = 8 + int.from_bytes(content[4:8], "big")
    else:
        return
    if whole > len(content):
        raise CordError(f"{where}: audio is cut off: {len(content)} of {whole} bytes; make the file again")
