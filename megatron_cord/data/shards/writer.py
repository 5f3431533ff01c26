"""Writes webdataset shards: tar files with ``{id}.json`` and ``{id}.wav`` for each sample.

A sample with several recordings has ``{id}.0.wav``, ``{id}.1.wav`` and so on. The JSON holds id, question (or turns),
answer, solution and voice, and what there is of choices, instruction, system and notes. WAVs are 16-bit PCM, mono, 16
kHz.
Whatever reads webdataset tars reads these. A shard is complete or invisible: it is written under a temporary name and
renamed, and the directory's manifest comes last.

What it simplifies: one process writes, and a shard waits in memory until it is full.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from megatron_cord.data.audio.wav import SAMPLING_RATE, encode_wav
from megatron_cord.data.fields import NOTES
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from megatron_cord.data.turns import turns_json
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import atomic_file, file_digest


class ShardWriter:
    """Fills a directory with shards; ``close`` completes it.

    Without that call the directory stays incomplete, and cannot be opened.

    Args:
        directory: created when missing.
        shard_size: samples a shard.
        source: the arguments that the samples are made with, kept in the manifest.
    """

    def __init__(
        self, directory: str | Path, *, shard_size: int = 512, source: Mapping[str, Any] | None = None
    ) -> None:
        if shard_size < 1:
            raise CordError(f"shard_size is {shard_size}; a shard holds at least one sample")
        self._directory = Path(directory)
        if (self._directory / MANIFEST_NAME).exists():
            raise CordError(
                f"{directory} holds a complete set of shards already; delete it or choose another directory"
            )
        self._shard_size = shard_size
        self._source = dict(source or {})
        self._pending: list[dict[str, Any]] = []
        self._shards: list[ShardEntry] = []
        self._ids: set[str] = set()
        self._voices: Counter[str] = Counter()
        self._seconds = 0.0

    def write(self, sample: Sample) -> None:
        """Add one sample.

        Raises:
            CordError: when the sample could not be read back or comes twice, or the disk is full.
        """
        if sample.id in self._ids:
            raise CordError(f"sample {sample.id} comes twice; ids must be unique")
        self._pending.append(encode_sample(sample))
        self._ids.add(sample.id)
        self._seconds += sum(map(len, sample.recordings)) / SAMPLING_RATE
        if sample.voice is not None:
            self._voices[sample.voice] += 1
        if len(self._pending) == self._shard_size:
            self._flush()

    def close(self) -> Manifest:
        """Write the last shard and the manifest."""
        if self._pending:
            self._flush()
        if not self._shards:
            raise CordError(f"{self._directory}: no samples to write; ask for at least one")
        manifest = Manifest(
            tuple(self._shards), dict(sorted(self._voices.items())), round(self._seconds, 3), self._source
        )
        with disk_errors(self._directory):
            for path in self._directory.glob("shard-*.tar"):
                if path.name not in {shard.name for shard in self._shards}:
                    path.unlink()  # of an earlier attempt that was larger and never completed
            manifest.write(self._directory)
        return manifest

    def _flush(self) -> None:
        name = f"shard-{len(self._shards):06d}.tar"
        self._shards.append(write_shard(self._directory / name, self._pending))
        self._pending.clear()


def encode_sample(sample: Sample, *, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Encode a sample as webdataset's writer takes it.

    Args:
        sample: with its recordings.
        metadata: notes to keep beside the sample's own.

    Raises:
        CordError: when the sample could not be read back: no question, an id with odd characters, bad audio, notes
            that are no JSON.
    """
    if not re.fullmatch(r"[A-Za-z0-9_+-]+", sample.id):
        raise CordError(f"sample id {sample.id!r}: use letters, digits, '_', '+' and '-' only; it becomes a file name")
    if not sample.question.strip():
        raise CordError(f"sample {sample.id} has no question; remove it")
    if sample.sampling_rate != SAMPLING_RATE:
        raise CordError(f"sample {sample.id}: audio at {sample.sampling_rate} Hz; resample it to {SAMPLING_RATE} Hz")
    recordings = sample.recordings
    if len(recordings) != sample.num_recordings:
        raise CordError(
            f"sample {sample.id} has {len(recordings)} recordings, its turns name {sample.num_recordings}; make them "
            "agree"
        )
    audio = {}
    for number, waveform in enumerate(recordings):
        where = f"sample {sample.id}" if len(recordings) == 1 else f"sample {sample.id}, recording {number}"
        try:
            audio["wav" if len(recordings) == 1 else f"{number}.wav"] = encode_wav(waveform)
        except ValueError as error:
            raise CordError(f"{where}: {error}; remove it or record it again") from error
    notes = {**sample.metadata, **(metadata or {})}
    try:
        written = json.dumps(_texts(sample) | ({NOTES: notes} if notes else {}), ensure_ascii=False)
    except TypeError as error:
        raise CordError(
            f"sample {sample.id}: its metadata is no JSON ({error}); keep texts and numbers alone"
        ) from None
    return {"__key__": sample.id, "json": written.encode(), **audio}


def _texts(sample: Sample) -> dict[str, Any]:
    texts: dict[str, Any] = {"id": sample.id}
    texts |= {"turns": turns_json(sample.turns)} if sample.turns else {"question": sample.question}
    texts |= {"answer": sample.answer, "solution": sample.solution, "voice": sample.voice}
    if sample.choices:
        texts["choices"] = list(sample.choices)
    return texts | {name: text for name in ("instruction", "system") if (text := getattr(sample, name)) is not None}


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> ShardEntry:
    """Write encoded samples as one shard, complete or invisible; each is written before the next is taken.

    Raises:
        CordError: the disk is full or may not be written.
    """
    with disk_errors(path.parent):
        # A fixed time: equal samples make equal files.
        with atomic_file(path, sync=True) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            count = 0
            for sample in samples:
                tar.write(sample)
                count += 1
        return ShardEntry(path.name, count, path.stat().st_size, file_digest(path))


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Report a full disk or a missing permission in one line."""
    try:
        yield
    except OSError as error:
        raise CordError(
            f"cannot write shards to {directory}: {error.strerror or error}; free some space or choose another "
            "directory"
        ) from error
