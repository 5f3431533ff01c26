"""Small samples, recordings and shards, whole and damaged, that tests write."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import soundfile

from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.data.shards.writer import ShardWriter

AUDIO = np.linspace(-0.5, 0.5, 320, dtype=np.float32)


def sample(number: int, **changes: object) -> Sample:
    fields: dict[str, object] = {
        "id": f"s-{number}",
        "question": f"what is {number} plus ½",
        "waveform": AUDIO * (number % 3),
        "answer": str(number),
        "voice": "en-us+f2",
    }
    return Sample(**{**fields, **changes})  # type: ignore[arg-type]


def write(directory: Path, count: int = 5, shard_size: int = 2) -> Manifest:
    writer = ShardWriter(directory, shard_size=shard_size, source={"seed": 3})
    for number in range(count):
        writer.write(sample(number))
    return writer.close()


def wav(rate: int = 16000, channels: int = 1, width: int = 2, frames: int = 100) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(frames * channels * width))
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def text(question: object = "what is one plus one", **more: object) -> bytes:
    return json.dumps({"question": question, **more}).encode()


def remove(directory: Path) -> None:
    (directory / "shard-000001.tar").unlink()


def cut(directory: Path) -> None:
    path = directory / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def damaged_set(directory: Path) -> Path:
    """Write 12 samples in shards of four: one twice, one cut off, one without text, and a shard that breaks off."""
    write(directory, count=12, shard_size=4)
    manifest = Manifest.read(directory)
    first, second, _ = (directory / entry.name for entry in manifest.shards)
    good = wav()
    tar(
        first,
        ("a.json", text()), ("a.wav", good),
        ("b.json", text()), ("b.wav", wav()[:90]),
        ("c.wav", good),
        ("s-8.json", text()), ("s-8.wav", good),
    )  # fmt: skip
    content = second.read_bytes()
    second.write_bytes(content[: content.index(b"s-6.wav") + 600])
    return directory


def flac() -> bytes:
    """Return half a second in stereo at 48 kHz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full((24000, 2), 0.25), 48000, format="FLAC")
    return buffer.getvalue()
