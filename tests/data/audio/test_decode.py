"""The one decoder: every container and header that programs write, and what is cut off or broken."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.audio.decode import count_samples, decode_audio
from megatron_cord.data.audio.wav import encode_float_wav, encode_wav
from megatron_cord.errors import CordError

TONE = (0.4 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)).astype(np.float32)


def encode(kind: str = "WAV", subtype: str | None = None, rate: int = 16000, channels: int = 1) -> bytes:
    """Return a second of a tone, the same in all channels."""
    tone = 0.4 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(tone[:, None], channels, axis=1), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Decode a recording, which must have as many samples as are counted when a set is opened."""
    waveform = decode_audio(content, "clip")
    file = io.BytesIO(b"before" + content + b"behind")
    file.seek(6)
    assert count_samples(file, len(content), "clip") == len(waveform)
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.abs(waveform).max() <= 1.0
    return waveform


def refused(content: bytes) -> str:
    """Return why a recording is refused, by the decoder and when a set is opened alike."""
    messages = []
    for read in (
        lambda: decode_audio(content, "clip"),
        lambda: count_samples(io.BytesIO(content), len(content), "clip"),
    ):
        with pytest.raises(CordError, match=r"^clip: ") as caught:
            read()
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


def with_data_size(content: bytes, size: int) -> bytes:
    place = content.index(b"data") + 4
    return content[:place] + struct.pack("<I", size) + content[place + 4 :]


def of_unknown_length(flac: bytes) -> bytes:
    """Return a FLAC file as an encoder leaves it that writes to a pipe: no number of samples in its header."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def test_shards_are_read_as_they_always_were() -> None:
    """Catches training audio that differs in its last bit from what was written."""
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, 5000).astype(np.float32)
    integers = np.round(noise * 32767.0).astype("<i2")
    assert np.array_equal(decode(encode_wav(noise)), integers.astype(np.float32) / np.float32(32767.0))
    lowest = encode_wav(noise)[:44] + struct.pack("<h", -32768) * 5000
    assert np.array_equal(decode(lowest), np.full(5000, -1.0, np.float32))
    assert np.array_equal(decode(encode_float_wav(noise)), noise)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_streamed_wav(size: int) -> None:
    """Catches a server's WAV file, written before its length was known, that "made no sound"."""
    content = encode_wav(TONE)
    assert np.array_equal(decode(with_data_size(content, size)), decode(content))


def test_a_recording_of_nothing_with_a_title_has_no_samples() -> None:
    """Catches a title behind an empty recording that is taken for its audio."""
    empty = with_data_size(encode_wav(TONE)[:44], 0)
    assert "no samples" in refused(empty) and "no samples" in refused(empty + b"LIST" + struct.pack("<I", 4) + b"INFO")


def test_flac_of_unknown_length() -> None:
    """Catches "576460752303424 s of audio"."""
    flac = encode("FLAC")
    assert np.array_equal(decode(of_unknown_length(flac)), decode(flac))
    assert "lost sync" in refused(of_unknown_length(flac)[: len(flac) // 2])


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [(kind, sub) for kind in ("WAV", "WAVEX") for sub in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")]
    + [("WAV", "ULAW"), ("WAV", "ALAW"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_16"), ("AIFF", "PCM_16")]
    + [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)],
)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2)])
def test_every_usual_encoding(kind: str, subtype: str | None, rate: int, channels: int) -> None:
    """Catches an encoding that is refused, one scaled or interleaved wrongly, and stereo read as twice the length."""
    waveform = decode(encode(kind, subtype, rate, channels))
    assert abs(len(waveform) - 16000) < 1200
    middle = waveform[4000:12000].astype(np.float64)
    assert np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle) == pytest.approx(300, abs=2)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44056, 44100, 96000, 192000])
def test_any_rate_keeps_the_tone(rate: int) -> None:
    """Catches a rate that is refused for its divisors, and a shift or gain by the resampler."""
    waveform = decode(encode(rate=rate))
    assert len(waveform) == 16000 and np.abs(waveform - TONE)[500:-500].max() < 2e-3


def test_what_16_khz_cannot_hold_is_removed() -> None:
    """Catches aliasing."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(2 * np.pi * 10000 * np.arange(48000) / 48000), 48000, format="WAV", subtype="FLOAT")
    assert np.abs(decode(buffer.getvalue())[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "FLAC", "AIFF", "OGG", "MP3"])
def test_what_is_cut_off_is_damaged(kind: str) -> None:
    """Catches half a recording that is trained on as if it were whole."""
    content = encode(kind, channels=2, rate=44100)
    refused(content[: len(content) // 2])
    refused(content[:50])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not a recording"),
        (b"not audio at all, but a text of some length that goes on", "not a recording"),
        (b"RIFF\x00\x00\x00\x00WAVE", "ends before its audio"),
        (encode_wav(TONE)[:12] + encode_wav(TONE)[36:], "without its format"),
        (encode_wav(TONE)[:30], "ends before its audio"),
        (encode(rate=1000), "1000 Hz"),
        (encode_wav(TONE)[:24] + b"\xff\xff\xff\xff" + encode_wav(TONE)[28:], "4294967295 Hz"),
        (encode_float_wav(np.array([0.0, np.nan], np.float32)), "NaN"),
        (with_data_size(encode_wav(TONE)[:44], 9000), "cut off: 0 of 9000 bytes"),
    ],
)
def test_bad_recordings_are_named(content: bytes, fault: str) -> None:
    """Catches a crash on what is no audio, and audio that is decided to be bad only when its turn comes."""
    assert fault in refused(content)


def test_hours_are_refused_before_they_are_read() -> None:
    """Catches a process that ends for want of memory."""
    head = encode_wav(TONE)[:40] + struct.pack("<I", 2 * 16000 * 3601)
    assert "3601 s of audio" in refused(head + bytes(2 * 16000 * 3601))


def test_the_same_samples_with_every_number_of_threads() -> None:
    """Catches a resampler whose result depends on anything but its input."""
    content = encode(rate=44100, channels=2)
    first = decode(content)
    assert all(np.array_equal(first, decode_audio(content, "clip")) for _ in range(3))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "RF64"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), max_size=5),
    header=st.booleans(),
    end=st.floats(0, 1) | st.just(1.0),
)
def test_broken_recordings_are_audio_or_an_error(
    kind: str, edits: list[tuple[float, int, bytes]], header: bool, end: float
) -> None:
    """Catches any exception but CordError, and a recording that is counted when a set is opened but not decoded."""
    content = bytearray(_short(kind))
    for place, removed, piece in edits:
        start = round(place * (60 if header else len(content)))
        content[start : start + removed] = piece
    broken = bytes(content[: round(end * len(content))])
    try:
        waveform = decode_audio(broken, "clip")
    except CordError:
        assert refused(broken)
        return
    assert len(waveform) == count_samples(io.BytesIO(broken), len(broken), "clip")
    assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 1.0


def _short(kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, 2000).reshape(-1, 2), 24000, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("highest", [32767.0, 1.3e38])
def test_floats_beyond_all_measure_are_refused(highest: float) -> None:
    """Catches integers that were written as floats, which would be clipped to noise, and a resampler that overflows."""
    file = io.BytesIO()
    samples = np.linspace(-highest, highest, 4000, dtype=np.float32)
    soundfile.write(file, samples, 44100, subtype="FLOAT", format="WAV")
    with pytest.raises(CordError, match="floats must lie between -1 and 1"):
        decode_audio(file.getvalue(), "x")
