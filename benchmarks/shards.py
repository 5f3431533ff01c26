"""The speed of `cord shards` beside its decoder and resampler alone, and over sets of simulated hours.

    python -m benchmarks.shards [--recordings 200] [--hours 1 10 100 1000] [--output benchmarks/results/shards.json]

First, recordings of five formats are read, decoded (soundfile) and resampled (soxr) in a loop and nothing else, and
then made into shards by one worker, in turn, three times each. The ratio is of the medians, once of processor time and
once by the clock, which other processes disturb. Then sets of more and more rows, which stand for hours of ten-second
recordings, are made: all rows name the same few files of a tenth of a second, so that what grows with the set (rows,
ids, receipts, memory) is what is measured.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr

from benchmarks.figures import processor, publish
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.speech.recordings.config import RecordingSetConfig, recording_quality
from megatron_cord.speech.recordings.recording_set import make_recording_set

KINDS = (("a.wav", 8000, 1), ("b.wav", 44100, 2), ("c.flac", 48000, 1), ("d.ogg", 22050, 1), ("e.wav", 16000, 1))
SECONDS = 10.0  # of a recording in the first part, and of one that a row stands for in the second
SHORT = 0.1  # of a recording in the second part
REPEATS = 3


def write_recordings(folder: Path, seconds: float) -> list[Path]:
    """Write a recording of each kind: a buzz whose loudness varies."""
    paths = []
    for name, rate, channels in KINDS:
        moments = np.arange(round(seconds * rate)) / rate
        sound = sum(np.sin(2 * np.pi * 120 * k * moments) / k for k in range(1, 20))
        sound = 0.2 * sound * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * moments))
        soundfile.write(folder / name, np.repeat(sound[:, None], channels, axis=1), rate)
        paths.append(folder / name)
    return paths


def write_rows(path: Path, recordings: list[Path], count: int) -> Path:
    """Write rows that name the recordings in turn."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "id": f"r{number}",
                "audio": recordings[number % len(recordings)].name,
                "question": f"what is {number}",
            }
            file.write(json.dumps(row) + "\n")
    return path


@dataclass(frozen=True)
class Taken:
    """What a piece of work took, in seconds."""

    processor: float
    clock: float


def timed(work: Callable[[], None]) -> Taken:
    """Return what it took."""
    begun = time.process_time(), time.perf_counter()
    work()
    return Taken(time.process_time() - begun[0], time.perf_counter() - begun[1])


def decode_alone(recordings: list[Path], count: int) -> None:
    """Read, decode, decoding, average channels and resample."""
    for number in range(count):
        audio, rate = soundfile.read(recordings[number % len(recordings)], dtype="float32", always_2d=True)
        mono = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
        if rate != 16000:
            soxr.resample(mono, rate, 16000)


def make(rows: Path, output: Path) -> None:
    """Make a set with one worker, in this process."""
    made = make_recording_set(RecordingSetConfig(str(rows), quality=recording_quality(min_seconds=0.05)), output)
    assert not made.rejects


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=int, default=200, help="of ten seconds, for the comparison")
    parser.add_argument("--hours", type=int, nargs="+", default=[1, 10, 100, 1000], help="that sets stand for")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = write_recordings(folder, SECONDS)
        rows = write_rows(folder / "rows.jsonl", recordings, arguments.recordings)
        alone, whole = [], []
        for repeat in range(REPEATS):
            alone.append(timed(lambda: decode_alone(recordings, arguments.recordings)))
            whole.append(timed(partial(make, rows, folder / f"set-{repeat}")))
        growth = []
        short = write_recordings(folder, SHORT)
        for hours in arguments.hours:
            count = round(hours * 3600 / SECONDS)
            many = write_rows(folder / f"{hours}.jsonl", short, count)
            taken = timed(partial(make, many, folder / f"hours-{hours}"))
            growth.append(
                {
                    "hours": hours,
                    "rows": count,
                    "processor_milliseconds_a_row": round(1000 * taken.processor / count, 3),
                    "clock_milliseconds_a_row": round(1000 * taken.clock / count, 3),
                    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                }
            )
    decoding, making = (
        [statistics.median(taken.processor for taken in all_of), statistics.median(taken.clock for taken in all_of)]
        for all_of in (alone, whole)
    )
    publish(
        {
            "machine": f"{os.cpu_count()} cores, {processor()}",
            "recordings": arguments.recordings,
            "decoder_alone_processor_seconds": round(decoding[0], 3),
            "shards_processor_seconds": round(making[0], 3),
            "ratio": round(decoding[0] / making[0], 3),
            "ratio_by_the_clock": round(decoding[1] / making[1], 3),
            "growth": growth,
        },
        arguments.output,
    )


if __name__ == "__main__":
    run(main)
