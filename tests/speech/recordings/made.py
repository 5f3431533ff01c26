"""Recordings for tests: a voice-like sound, in any format libsndfile writes, and rows that name the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def voice(seconds: float, rate: int = 16000, *, seed: int = 0, peak: float = 0.5) -> np.ndarray:
    """Return a buzz of a drawn pitch whose loudness varies as syllables do: float32 [samples]."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = draw.uniform(90.0, 220.0)
    buzz = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 8))
    sound = buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 4.0 * time))
    scaled: np.ndarray = (peak * sound / np.abs(sound).max()).astype(np.float32)
    return scaled


def write_voice(path: Path, seconds: float = 0.4, rate: int = 16000, *, channels: int = 1, **sound: Any) -> Path:
    """Write a recording; the path's extension decides about the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = np.repeat(voice(seconds, rate, **sound)[:, None], channels, axis=1)
    soundfile.write(path, waveform, rate)
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_set(directory: Path, count: int) -> Path:
    """Write recordings of several formats with their rows; return the file of rows."""
    kinds = (("wav", 16000, 1), ("flac", 44100, 2), ("ogg", 22050, 1), ("wav", 8000, 1))
    rows = []
    for number in range(count):
        extension, rate, channels = kinds[number % len(kinds)]
        name = f"audio/Prise de son {number:03} é.{extension}"
        write_voice(directory / name, 0.3 + 0.01 * (number % 7), rate, channels=channels, seed=number)
        rows.append(
            {"id": f"r{number}", "audio": name, "question": f"What is {number} plus two?", "answer": number + 2}
        )
    return write_rows(directory / "rows.jsonl", rows)


def set_bytes(directory: Path) -> dict[str, bytes]:
    """Return the content of a set's files by name."""
    kept = {".tar", ".jsonl"}
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in kept or p.name == "manifest.json"}


def rejects(directory: Path) -> dict[str, str]:
    """Return the reasons for what was left out, by id."""
    lines = (directory / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {reject["id"]: reject["reason"] for reject in map(json.loads, lines)}
