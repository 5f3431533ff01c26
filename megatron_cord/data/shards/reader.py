"""Reads webdataset shards: tar files with recordings and ``{id}.json`` for each sample (see ``writer``).

Everything is checked when a data set is opened, so that a bad sample stops a run before its first step, or is left out
for the whole of it: WAV files of integers by their headers, for nothing else can be wrong with them, other recordings
by decoding them. Only JSON and audio are ever decoded: a shard cannot carry code.

What it simplifies: the index of offsets is built anew at every start, and shards are local, uncompressed files.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron_cord.data.audio.decode import count_samples, decode_audio
from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.samples import PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.manifest import Manifest, ShardEntry
from megatron_cord.data.shards.members import Parts, find_samples, read_members, shown
from megatron_cord.data.shards.texts import read_sample
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one sample lies: offsets in bytes from the start of its shard."""

    shard: Path
    id: str
    json_offset: int
    json_size: int
    recordings: tuple[tuple[int, int], ...]  # offset and size of each
    lengths: tuple[int, ...] = ()  # of each, in samples

    @property
    def where(self) -> str:
        return f"{self.shard}: sample {self.id}"

    def where_recording(self, number: int) -> str:
        """Name a recording in errors."""
        return self.where if len(self.recordings) == 1 else f"{self.where}, recording {number}"


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
        limits: what prompts can be made of; other samples are left out.
        defaults: what prompts have where a sample brings nothing of its own.
        verify: compare every shard's SHA-256 with the manifest's, which reads all of them.

    Attributes:
        skipped: what was left out, in the order of the shards.

    Raises:
        CordError: naming shard and sample, when a shard is missing, truncated or not a tar; when a sample lacks audio
            or text, has a field that nothing uses, audio that cannot be decoded or is outside the limits, or comes
            twice, and this is more than may be skipped; and when there are no samples at all.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_skipped: float = 0.0,
        limits: PromptLimits = PromptLimits(),  # noqa: B008  (it is immutable)
        defaults: PromptDefaults = PromptDefaults(),  # noqa: B008
        verify: bool = False,
    ) -> None:
        self._defaults = defaults
        self._entries: list[_Entry] = []
        self.skipped: list[Skipped] = []
        self._shards: list[tuple[Path, ShardEntry | None]] = []
        seen: dict[str, Path] = {}
        for shard, listed in _find_shards(path):
            problem = _changed(shard, listed, verify) if listed else None
            if problem is not None and (not max_skipped or verify or not shard.is_file()):
                self._skip(Skipped(str(shard), f"{shard} {problem}", listed.samples if listed else 1), max_skipped)
                continue
            self._shards.append((shard, listed if problem is None else None))
            for found, item in enumerate(_index(shard, limits, defaults)):
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
            raise CordError(f"{path} holds no samples: its shards are empty")

    @property
    def fingerprint(self) -> str:
        """Stands for the samples, their content and their order: 16 hexadecimal digits.

        The content is that of the shards, by the manifest's checksums; a shard that no manifest lists, or that differs
        from what it lists, is read for its own. What a set gives its prompts is part of the samples.
        """
        contents = [file_digest(shard) if listed is None else listed.sha256 for shard, listed in self._shards]
        given = [] if self._defaults == PromptDefaults() else [repr(self._defaults)]
        return fingerprint([*contents, *self.ids, *given])

    def _skip(self, item: Skipped, max_skipped: float) -> None:
        if not max_skipped:
            raise CordError(item.message)
        self.skipped.append(item)

    def refuse_longer(self, longest: int) -> None:
        """Refuse a set with a recording of more samples.

        Raises:
            CordError: naming the longest.
        """
        longest_of = [max(entry.lengths) for entry in self._entries]
        most = max(longest_of)
        if most > longest:
            entry = self._entries[longest_of.index(most)]
            count = sum(samples > longest for samples in longest_of)
            raise CordError(
                f"{entry.where_recording(entry.lengths.index(most))}: {most / SAMPLING_RATE:.2f} s of audio, the "
                f"encoder's window is {longest / SAMPLING_RATE:.2f} s ({count} of {len(self)} samples are longer); "
                "shorten them, or set data.long_audio to cut or skip"
            )

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
                sample = _read_sample(file, entry, self._defaults)
                recordings = []
                for number, (offset, size) in enumerate(entry.recordings):
                    file.seek(offset)
                    recordings.append(decode_audio(file.read(size), entry.where_recording(number)))
        except OSError as error:
            raise CordError(
                f"{entry.where}: cannot be read ({error.strerror}); the shard must stay in place during a run"
            ) from error
        return sample.with_recordings(recordings)

    def without_audio(self, index: int) -> Sample:
        """Return a sample whose audio is neither read nor decoded, for what needs its text alone."""
        entry = self._entries[index]
        with entry.shard.open("rb") as file:
            return _read_sample(file, entry, self._defaults)


def _find_shards(path: str | Path) -> list[tuple[Path, ShardEntry | None]]:
    """Return the shards in their order, with their entries in a manifest."""
    directory = Path(path)
    if directory.is_dir():
        return [(directory / entry.name, entry) for entry in Manifest.read(directory).shards]
    matches = sorted(Path(match) for match in glob.glob(str(path)))  # noqa: PTH207 (absolute patterns, too)
    if not matches:
        beside = sorted(item.name for item in directory.parent.glob("*")) if directory.parent.is_dir() else []
        raise CordError(f"{path}: no such directory or shard; check the path ({directory.parent} has {shown(beside)})")
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


def _index(shard: Path, limits: PromptLimits, defaults: PromptDefaults) -> Iterator[_Entry | Skipped]:
    """Every sample of one shard, checked; last, if the shard ends too early, that it does."""
    try:
        with shard.open("rb") as file:
            members, problem = read_members(file, shard)
            samples = find_samples(members)
            if problem is not None and samples and (samples[-1].text is None or not samples[-1].audio):
                samples.pop()  # the sample at which the shard breaks off
            for parts in samples:
                yield _checked(file, shard, parts, limits, defaults)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check that it is a file and may be read"
    if problem is not None:
        yield Skipped(str(shard), f"{shard} {problem}")


def _checked(
    file: BinaryIO, shard: Path, parts: Parts, limits: PromptLimits, defaults: PromptDefaults
) -> _Entry | Skipped:
    where = f"{shard}: sample {parts.key}"
    text, audio = parts.text, parts.audio
    if text is None or not audio:
        missing = "text (.json)" if text is None else "audio (.wav, .flac …)"
        return Skipped(where, f"{where} has no {missing}, only {shown(parts.names)}; add it or remove the sample")
    if parts.fault is not None:
        return Skipped(where, f"{where} {parts.fault}")
    recordings = tuple((member.offset_data, member.size) for member in audio)
    entry = _Entry(shard, parts.key, text.offset_data, text.size, recordings)
    try:
        sample = _read_sample(file, entry, defaults)
        if sample.num_recordings != len(audio):
            return Skipped(where, f"{where} {_miscounted(sample.num_recordings, parts)}")
        lengths = []
        for number, (offset, size) in enumerate(recordings):
            file.seek(offset)
            lengths.append(count_samples(file, size, entry.where_recording(number)))
    except CordError as error:
        return Skipped(where, str(error))
    fault = limits.fault(lengths, sample)
    return replace(entry, lengths=tuple(lengths)) if fault is None else Skipped(where, f"{where} {fault}")


def _miscounted(wanted: int, parts: Parts) -> str:
    given = len(parts.audio)
    if wanted > given:
        return f"lacks its recording {given}: its turns have {wanted}, its files are {shown(parts.names)}; add it"
    return f"has recording {wanted}, which its JSON does not mention ({shown(parts.names)}); remove it"


def _read_sample(file: BinaryIO, entry: _Entry, defaults: PromptDefaults) -> Sample:
    file.seek(entry.json_offset)
    return defaults.complete(read_sample(file.read(entry.json_size), entry.id, entry.where))
