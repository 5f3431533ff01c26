"""What is in a shard: where its samples lie, what cannot be used, and how a sample is read.

Everything is checked when a shard is indexed: WAV files of integers by their headers, for nothing else can be wrong
with them, other recordings by decoding them. Only JSON and audio are ever decoded: a shard cannot carry code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron_cord.data.audio.decode import count_samples, decode_audio
from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.samples import PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.members import Parts, find_samples, read_members, shown
from megatron_cord.data.shards.texts import read_sample
from megatron_cord.errors import CordError


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample lies: offsets in bytes from the start of its shard."""

    shard: Path
    name: str  # of the shard, in errors
    id: str
    json_offset: int
    json_size: int
    recordings: tuple[tuple[int, int], ...]  # offset and size of each
    lengths: tuple[int, ...] = ()  # of each, in samples

    @property
    def where(self) -> str:
        """Name the sample in errors."""
        return f"{self.name}: sample {self.id}"

    @property
    def longest(self) -> int:
        """Samples of the longest recording."""
        return max(self.lengths)

    def where_recording(self, number: int) -> str:
        """Name a recording in errors."""
        return self.where if len(self.recordings) == 1 else f"{self.where}, recording {number}"

    def too_long(self, longest: int, others: str = "") -> str:
        """Return what is wrong with a recording of more samples than the encoder's window has."""
        return (
            f"{self.where_recording(self.lengths.index(self.longest))}: {self.longest / SAMPLING_RATE:.2f} s of audio, "
            f"the encoder's window is {longest / SAMPLING_RATE:.2f} s{others}; shorten them, or set data.long_audio to "
            "cut or skip"
        )


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


def index_shard(
    shard: Path, limits: PromptLimits, defaults: PromptDefaults, name: str | None = None
) -> Iterator[Entry | Skipped]:
    """Yield every sample of a shard, checked; last, if the shard ends too early, that it does, with the shard as place.

    Args:
        shard: its file.
        limits: what prompts can be made of; other samples are left out.
        defaults: system prompt and instruction of samples that lack them.
        name: of the shard in messages; None takes the file's path.
    """
    name = str(shard) if name is None else name
    try:
        with shard.open("rb") as file:
            members, problem = read_members(file, shard)
            samples = find_samples(members)
            if problem is not None and samples and (samples[-1].text is None or not samples[-1].audio):
                samples.pop()  # the sample at which the shard breaks off
            for parts in samples:
                recordings = tuple((member.offset_data, member.size) for member in parts.audio)
                start, size = (0, 0) if parts.text is None else (parts.text.offset_data, parts.text.size)
                yield _checked(file, Entry(shard, name, parts.key, start, size, recordings), parts, limits, defaults)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check that it is a file and may be read"
    if problem is not None:
        yield Skipped(name, f"{name} {problem}")


def read_entry(entry: Entry, defaults: PromptDefaults) -> Sample:
    """Read a sample.

    Raises:
        CordError: its content is damaged.
        OSError: its shard cannot be read.
    """
    with entry.shard.open("rb") as file:
        sample = _read_sample(file, entry, defaults)
        recordings = []
        for number, (offset, size) in enumerate(entry.recordings):
            file.seek(offset)
            recordings.append(decode_audio(file.read(size), entry.where_recording(number)))
    return sample.with_recordings(recordings)


def read_entry_text(entry: Entry, defaults: PromptDefaults) -> Sample:
    """Read a sample without its audio. Raises as `read_entry`."""
    with entry.shard.open("rb") as file:
        return _read_sample(file, entry, defaults)


def _checked(
    file: BinaryIO, entry: Entry, parts: Parts, limits: PromptLimits, defaults: PromptDefaults
) -> Entry | Skipped:
    where = entry.where
    if parts.text is None or not parts.audio:
        missing = "text (.json)" if parts.text is None else "audio (.wav, .flac …)"
        return Skipped(where, f"{where} has no {missing}, only {shown(parts.names)}; add it or remove the sample")
    if parts.fault is not None:
        return Skipped(where, f"{where} {parts.fault}")
    try:
        sample = _read_sample(file, entry, defaults)
        if sample.num_recordings != len(parts.audio):
            return Skipped(where, f"{where} {_miscounted(sample.num_recordings, parts)}")
        lengths = []
        for number, (offset, size) in enumerate(entry.recordings):
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


def _read_sample(file: BinaryIO, entry: Entry, defaults: PromptDefaults) -> Sample:
    file.seek(entry.json_offset)
    return defaults.complete(read_sample(file.read(entry.json_size), entry.id, entry.where))
