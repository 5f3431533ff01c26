"""Reads webdataset shards: tar files with ``{id}.wav`` and ``{id}.json`` for each sample (see ``shard_writer``).

Everything but the audio itself is checked when a data set is opened, so that a bad sample stops a run before its
first step, or is left out for the whole of it. Only JSON and PCM are ever decoded: a shard cannot carry code.

What it simplifies: the index of offsets is built anew at every start, and shards are local, uncompressed files.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cord.data.audio.wav import SAMPLING_RATE, check_wav, decode_wav
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import Manifest, ShardEntry
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint

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


@dataclass(frozen=True)
class Skipped:
    """What a data set leaves out.

    Attributes:
        place: the shard, or the shard and the sample.
        message: what is wrong with it; begins with the place.
        samples: how many samples that is, as far as the manifest tells.
    """

    place: str
    message: str
    samples: int = 1


class ShardDataset:
    """Samples of one or more shards, by number, in the order of the shards and of the samples in them.

    What cannot be used is decided here, from the files alone and before the first sample is taken: so all ranks, and
    every restart on the same files, leave out the same. By default nothing may be left out.

    A data set holds no open file: it may be used after a fork and by several threads.

    Args:
        path: a directory with a manifest, a tar file, or a pattern such as "data/*.tar" (which looks at no manifest).
        max_skipped: the largest share of samples that may be left out.
        longest: samples of audio beyond which a clip is left out; None takes all lengths.
        verify: compare every shard's SHA-256 with the manifest's, which reads all of them.

    Attributes:
        skipped: what was left out, in the order of the shards.

    Raises:
        CordError: naming shard and sample, when a shard is missing, truncated or not a tar; when a sample lacks audio
            or text, has audio that is not 16-bit PCM, mono, 16 kHz, or no samples of it, or comes twice, and this is
            more than may be skipped; and when there are no samples at all.
    """

    def __init__(
        self, path: str | Path, *, max_skipped: float = 0.0, longest: int | None = None, verify: bool = False
    ) -> None:
        self._entries: list[_Entry] = []
        self.skipped: list[Skipped] = []
        seen: dict[str, Path] = {}
        for shard, listed in _find_shards(path):
            problem = _changed(shard, listed, verify) if listed else None
            if problem is not None and (not max_skipped or verify or not shard.is_file()):
                self._skip(Skipped(str(shard), f"{shard} {problem}", listed.samples if listed else 1), max_skipped)
                continue
            for found, item in enumerate(_index(shard, longest)):
                if isinstance(item, _Entry) and item.id in seen:
                    item = Skipped(
                        item.where, f"{item.where} is in {seen[item.id]} too; ids must be unique: remove one of them"
                    )
                if isinstance(item, Skipped):
                    if item.place == str(shard) and listed:  # the rest of a shard that ends too early
                        item = replace(item, samples=max(1, listed.samples - found))
                    self._skip(item, max_skipped)
                else:
                    seen[item.id] = shard
                    self._entries.append(item)
        count = sum(item.samples for item in self.skipped)
        if count > max_skipped * (count + len(self)):
            first = self.skipped[0]
            raise CordError(
                f"{path}: {count} of {count + len(self)} samples cannot be used, more than "
                f"max_skipped={max_skipped:g} allows; the first: "
                f"{first.message}"
            )
        if not self._entries:
            raise CordError(f"{path} holds no samples; make some with cord synthesize")

    @property
    def fingerprint(self) -> str:
        """Stands for the samples and their order: 16 hexadecimal digits over their ids."""
        return fingerprint(self.ids)

    def _skip(self, item: Skipped, max_skipped: float) -> None:
        if not max_skipped:
            raise CordError(item.message)
        self.skipped.append(item)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in their order."""
        return [entry.id for entry in self._entries]

    def id_of(self, index: int) -> str:
        """Return a sample's id without reading it."""
        return self._entries[index].id

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        try:
            with entry.shard.open("rb") as file:
                texts = _read_texts(file, entry)
                file.seek(entry.wav_offset)
                waveform = decode_wav(file.read(entry.wav_size), entry.where)
        except OSError as error:
            raise CordError(
                f"{entry.where}: cannot be read ({error.strerror}); the shard must stay in place during a run"
            ) from error
        return replace(_sample(entry, texts), waveform=waveform)

    def texts(self, index: int) -> dict[str, Any]:
        """Return a sample's JSON, without its audio: id, question, answer, solution, voice and choices."""
        entry = self._entries[index]
        with entry.shard.open("rb") as file:
            return {"id": entry.id} | _read_texts(file, entry)

    def without_audio(self, index: int) -> Sample:
        """Return a sample whose audio is neither read nor decoded, for what needs its text alone."""
        return _sample(self._entries[index], self.texts(index))


def _sample(entry: _Entry, texts: Mapping[str, Any]) -> Sample:
    return Sample(
        id=entry.id,
        question=texts["question"],
        sampling_rate=SAMPLING_RATE,
        answer=texts.get("answer"),
        solution=texts.get("solution"),
        voice=texts.get("voice"),
        choices=tuple(texts.get("choices") or ()),
    )


def _find_shards(path: str | Path) -> list[tuple[Path, ShardEntry | None]]:
    """Return the shards in their order, with their entries in a manifest."""
    directory = Path(path)
    if directory.is_dir():
        return [(directory / entry.name, entry) for entry in Manifest.read(directory).shards]
    matches = sorted(Path(match) for match in glob.glob(str(path)))  # noqa: PTH207 (absolute patterns, too)
    if not matches:
        raise CordError(f"{path}: no such directory or shard; check the path, or make shards with cord synthesize")
    return [(match, None) for match in matches]


def _changed(shard: Path, listed: ShardEntry, verify: bool) -> str | None:
    """How a shard differs from what the manifest says."""
    if not shard.is_file():
        return "is missing, but the manifest lists it; restore it or make the shards again"
    size = shard.stat().st_size
    if size != listed.bytes:
        return f"has {size} of {listed.bytes} bytes: truncated or changed; restore it or make the shards again"
    if verify and file_digest(shard) != listed.sha256:
        return "does not have the checksum that the manifest lists; restore it or make the shards again"
    return None


def _index(shard: Path, longest: int | None) -> Iterator[_Entry | Skipped]:
    """Every sample of one shard, checked; last, if the shard ends too early, that it does."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with shard.open("rb") as file:
            members, problem = _members(file, shard)
            for member in members:
                # webdataset's convention: the key ends at the first dot of the file's name.
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                sample = parts.setdefault(key, {})
                if extension in sample:
                    where = f"{shard}: sample {key}"
                    yield Skipped(where, f"{where} comes twice; ids must be unique: remove one of them")
                sample.setdefault(extension, member)
            if problem is not None and parts and not {"json", "wav"} <= next(reversed(parts.values())).keys():
                parts.popitem()  # the sample at which the shard breaks off
            for key, members_of_key in parts.items():
                yield _checked(file, shard, key, members_of_key, longest)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check that it is a file and may be read"
    if problem is not None:
        yield Skipped(str(shard), f"{shard} {problem}")


def _checked(
    file: BinaryIO, shard: Path, key: str, members: dict[str, tarfile.TarInfo], longest: int | None
) -> _Entry | Skipped:
    where = f"{shard}: sample {key}"
    if "json" not in members:
        return Skipped(where, f"{where} has no text ({key}.json is missing); add it or remove the sample")
    if "wav" not in members:
        return Skipped(where, f"{where} has no audio ({key}.wav is missing); add it or remove the sample")
    text, audio = members["json"], members["wav"]
    entry = _Entry(shard, key, text.offset_data, text.size, audio.offset_data, audio.size)
    try:
        _read_texts(file, entry)
        file.seek(entry.wav_offset)
        samples = check_wav(file, entry.wav_size, entry.where)
    except CordError as error:
        return Skipped(where, str(error))
    if longest is not None and samples > longest:
        return Skipped(
            where,
            f"{where} has {samples / SAMPLING_RATE:.2f} s of audio, the longest allowed are "
            f"{longest / SAMPLING_RATE:.2f} s",
        )
    return entry


def _members(file: BinaryIO, shard: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """Return the regular files of a tar that lie wholly in it, and what is wrong with the tar."""
    members, end, size = [], 0, shard.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                if member.isreg() and member.offset_data + member.size <= size:
                    members.append(member)
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # the last three: numbers in a damaged header
        return members, f"is truncated or not a tar file ({error}); restore it or make the shards again"
    # tarfile takes a damaged header for the end; a real end is two blocks of zeros.
    file.seek(end)
    if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
        return members, f"is truncated or damaged at byte {end}; restore it or make the shards again"
    return members, None


def _read_texts(file: BinaryIO, entry: _Entry) -> dict[str, Any]:
    """Read the sample's JSON object: a question, and texts or null."""
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
    choices = texts.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise CordError(f"{entry.where}: its choices are no list of texts; write one or leave them out")
    if texts.get("id", entry.id) != entry.id:
        raise CordError(f"{entry.where}: its JSON calls it {texts['id']!r}; file name and id must agree")
    return texts
