"""Reads webdataset shards: tar files with ``{id}.wav`` and ``{id}.json`` for each sample (see ``shard_writer``).

Everything but the audio itself is checked when a data set is opened, so that a bad sample stops a run before its first step. Only JSON and
PCM are ever decoded: a shard cannot carry code.

What it simplifies: the index of offsets is built anew at every start, and shards are local, uncompressed files.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cord.data.manifest import Manifest
from megatron_cord.data.samples import Sample
from megatron_cord.data.wav import SAMPLING_RATE, check_wav, decode_wav
from megatron_cord.errors import CordError

_BLOCK = 512  # bytes; tar's unit


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one sample lies: offsets in bytes from the start of its shard."""

    shard: Path
    id: str
    json_offset: int
    json_size: int
    wav_offset: int
    wav_size: int

    @property
    def where(self) -> str:
        return f"{self.shard}: sample {self.id}"


class ShardDataset:
    """Samples of one or more shards, by number, in the order of the shards and of the samples in them.

    A data set holds no open file: it may be used after a fork and by several threads.

    Args:
        path: a directory with a manifest, a tar file, or a pattern such as "data/*.tar" (which looks at no manifest).

    Raises:
        CordError: naming shard and sample, when a shard is missing, truncated or not a tar; when a sample lacks audio or text, has audio that is
            not 16-bit PCM, mono, 16 kHz, or no samples of it, or comes twice; and when there are no samples at all.
    """

    def __init__(self, path: str | Path) -> None:
        self._entries: list[_Entry] = []
        seen: dict[str, Path] = {}
        for shard in _find_shards(path):
            for entry in _index(shard):
                if entry.id in seen:
                    raise CordError(f"{entry.where} is in {seen[entry.id]} too; ids must be unique: remove one of them")
                seen[entry.id] = shard
                self._entries.append(entry)
        if not self._entries:
            raise CordError(f"{path} holds no samples; make some with tools/synthesize.py")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in their order."""
        return [entry.id for entry in self._entries]

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        try:
            with entry.shard.open("rb") as file:
                texts = _read_texts(file, entry)
                file.seek(entry.wav_offset)
                waveform = decode_wav(file.read(entry.wav_size), entry.where)
        except OSError as error:
            raise CordError(f"{entry.where}: cannot be read ({error.strerror}); the shard must stay in place during a run") from error
        return Sample(
            id=entry.id,
            question=texts["question"],
            waveform=waveform,
            sampling_rate=SAMPLING_RATE,
            answer=texts.get("answer"),
            solution=texts.get("solution"),
            voice=texts.get("voice"),
        )


def _find_shards(path: str | Path) -> list[Path]:
    directory = Path(path)
    if directory.is_dir():
        return _listed_shards(directory)
    matches = sorted(Path(match) for match in glob.glob(str(path)))
    if not matches:
        raise CordError(f"{path}: no such directory or shard; check the path, or make shards with tools/synthesize.py")
    return matches


def _listed_shards(directory: Path) -> list[Path]:
    """The manifest's shards, none missing, each of the size it was written with."""
    shards = []
    for entry in Manifest.read(directory).shards:
        shard = directory / entry.name
        if not shard.is_file():
            raise CordError(f"{shard} is missing, but {directory}'s manifest lists it; restore it or make the shards again")
        size = shard.stat().st_size
        if size != entry.bytes:
            raise CordError(f"{shard} has {size} of {entry.bytes} bytes: truncated or changed; restore it or make the shards again")
        shards.append(shard)
    return shards


def _index(shard: Path) -> Iterator[_Entry]:
    """Every sample of one shard, checked."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with shard.open("rb") as file:
            for member in _members(file, shard):
                # webdataset's convention: the key ends at the first dot of the file's name.
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                sample = parts.setdefault(key, {})
                if extension in sample:
                    raise CordError(f"{shard}: sample {key} comes twice; ids must be unique: remove one of them")
                sample[extension] = member
            for key, members in parts.items():
                if "json" not in members:
                    raise CordError(f"{shard}: sample {key} has no text ({key}.json is missing); add it or remove the sample")
                if "wav" not in members:
                    raise CordError(f"{shard}: sample {key} has no audio ({key}.wav is missing); add it or remove the sample")
                text, audio = members["json"], members["wav"]
                entry = _Entry(shard, key, text.offset_data, text.size, audio.offset_data, audio.size)
                _read_texts(file, entry)
                file.seek(entry.wav_offset)
                check_wav(file, entry.wav_size, entry.where)
                yield entry
    except OSError as error:
        raise CordError(f"{shard} cannot be read ({error.strerror}); check that it is a file and may be read") from error


def _members(file: BinaryIO, shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar that is whole."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                if member.isreg():
                    yield member
    except tarfile.TarError as error:
        raise CordError(f"{shard} is truncated or not a tar file ({error}); restore it or make the shards again") from error
    # tarfile takes a damaged header for the end; a real end is two blocks of zeros.
    file.seek(end)
    if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
        raise CordError(f"{shard} is truncated or damaged at byte {end}; restore it or make the shards again")


def _read_texts(file: BinaryIO, entry: _Entry) -> dict[str, Any]:
    """The sample's JSON object: a question, and texts or null."""
    file.seek(entry.json_offset)
    try:
        texts = json.loads(file.read(entry.json_size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CordError(f"{entry.where}: its text is not JSON in UTF-8 ({error}); write it again") from error
    if not isinstance(texts, dict):
        raise CordError(f'{entry.where}: its JSON is no object; write {{"question": ...}}')
    question = texts.get("question")
    if not isinstance(question, str) or not question.strip():
        raise CordError(f'{entry.where} has no text: its JSON needs a "question"; add it or remove the sample')
    for name in ("answer", "solution", "voice"):
        if not isinstance(texts.get(name), (str, type(None))):
            raise CordError(f"{entry.where}: {name} is {texts[name]!r}; write text or leave it out")
    if texts.get("id", entry.id) != entry.id:
        raise CordError(f"{entry.where}: its JSON calls it {texts['id']!r}; file name and id must agree")
    return texts
