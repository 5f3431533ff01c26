"""Reads webdataset shards: tar files with recordings and ``{id}.json`` for each sample (see ``writer``).

Everything is checked when a data set is opened, so that a bad sample stops a run before its first step, or is left out
for the whole of it.

What it simplifies: the index of offsets is built anew at every start, and shards are local, uncompressed files.
`StreamedShards` reads sets that are too large for that.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_cord.data.samples import PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.entries import Entry, Skipped, index_shard, read_entry, read_entry_text
from megatron_cord.data.shards.manifest import Manifest, ShardEntry, shard_fault
from megatron_cord.data.shards.members import shown
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint


class ShardDataset:
    """Samples of one or more shards, by number, in the order of the shards and of the samples in them.

    What cannot be used is decided here, from the files alone and before the first sample is taken: so all ranks, and
    every restart on the same files, leave out the same. By default nothing may be left out.

    A data set holds no open file: it may be used after a fork and by several threads.

    Args:
        path: a directory with a manifest, a tar file, or a pattern such as "data/*.tar" (which looks at no manifest).
        max_skipped: the largest share of samples that may be left out.
        limits: what prompts can be made of; other samples are left out.
        defaults: system prompt and instruction of samples that lack them.
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
        self._entries: list[Entry] = []
        self.skipped: list[Skipped] = []
        self._shards: list[tuple[Path, ShardEntry | None]] = []
        seen: dict[str, Path] = {}
        for shard, listed in _find_shards(path):
            problem = shard_fault(shard, listed, verify=verify) if listed else None
            if problem is not None and (not max_skipped or verify or not shard.is_file()):
                self._skip(Skipped(str(shard), f"{shard} {problem}", listed.samples if listed else 1), max_skipped)
                continue
            self._shards.append((shard, listed if problem is None else None))
            for found, item in enumerate(index_shard(shard, limits, defaults)):
                if isinstance(item, Entry) and item.id in seen:
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
        entry = max(self._entries, key=lambda entry: entry.longest)
        if entry.longest > longest:
            count = sum(entry.longest > longest for entry in self._entries)
            raise CordError(entry.too_long(longest, f" ({count} of {len(self)} samples are longer)"))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in their order."""
        return [entry.id for entry in self._entries]

    def id_of(self, index: int) -> str:
        """Return a sample's id without reading it."""
        return self._entries[index].id

    def lengths_of(self, index: int) -> tuple[int, ...]:
        """Return the length of each of a sample's recordings, in samples of audio, without reading it."""
        return self._entries[index].lengths

    def __getitem__(self, index: int) -> Sample:
        return self._read(self._entries[index], read_entry)

    def without_audio(self, index: int) -> Sample:
        """Return a sample whose audio is neither read nor decoded, for what needs its text alone."""
        return self._read(self._entries[index], read_entry_text)

    def expect(self, shards: Sequence[int]) -> None:
        """Do nothing: all shards are indexed, and whole files (see `StreamedShards`)."""

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _read(self, entry: Entry, read: Callable[[Entry, PromptDefaults], Sample]) -> Sample:
        try:
            return read(entry, self._defaults)
        except OSError as error:
            raise CordError(
                f"{entry.where}: cannot be read ({error.strerror}); the shard must stay in place during a run"
            ) from error


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
