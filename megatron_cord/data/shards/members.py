"""Which files of a tar belong together as a sample, and what is wrong with the tar.

webdataset's convention: files of one sample have one name, which ends at the first dot. Names with dots in them are
read too: files that have one name up to the *last* dot, a JSON and a recording among them, are a sample. A sample with
several recordings has them numbered: q1.json, q1.0.wav, q1.1.wav. Extensions count in any case; "./" before a name and
hidden files, such as macOS's ._q1.json, do not.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TEXT = "json"
AUDIO = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "aif")  #: extensions of recordings
_BLOCK = 512  # bytes; tar's unit
_SHOWN = 8
_NUMBERED = re.compile(r"(?P<stem>.+)\.(?P<number>0|[1-9][0-9]{0,2})")


@dataclass(frozen=True)
class _File:
    extension: str  # in lower case
    number: int | None  # of a recording that has one
    member: tarfile.TarInfo

    @property
    def place(self) -> int:
        """Among the recordings."""
        return -1 if self.number is None else self.number


@dataclass(frozen=True)
class Parts:
    """The files of one sample.

    Attributes:
        key: their common name.
        text: the JSON; None without one.
        audio: the recordings by number; a single one needs none. Empty without one.
        fault: why they are no sample whatever is in them; None if they are one or lack a part.
        names: of all its files as the tar has them.
    """

    key: str
    text: tarfile.TarInfo | None
    audio: tuple[tarfile.TarInfo, ...]
    fault: str | None
    names: tuple[str, ...]


def read_members(file: BinaryIO, shard: Path) -> tuple[list[tarfile.TarInfo], str | None]:
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


def find_samples(members: Sequence[tarfile.TarInfo]) -> list[Parts]:
    """Return the samples in the order of their first files."""
    paths = [(member, path) for member in members if (path := _path(member.name)) is not None]
    extensions: dict[str, set[str]] = {}
    for _, path in paths:
        stem, extension = _at_last_dot(path)
        extensions.setdefault(stem, set()).add(extension)
    described = {stem for stem, found in extensions.items() if TEXT in found}
    recorded = {stem for stem, found in extensions.items() if not found.isdisjoint(AUDIO)}
    several = {match["stem"] for stem in recorded if (match := _NUMBERED.fullmatch(stem))} & described
    whole = described & recorded
    grouped: dict[str, list[_File]] = {}
    for member, path in paths:
        key, extension = _at_last_dot(path)
        number = None
        if key not in whole | several:
            numbered = _NUMBERED.fullmatch(key) if extension in AUDIO else None
            if numbered is not None and numbered["stem"] in several:
                key, number = numbered["stem"], int(numbered["number"])
            else:
                folder, slash, name = path.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}{slash}{stem}"
        grouped.setdefault(key, []).append(_File(extension.lower(), number, member))
    return [_parts(key, files) for key, files in grouped.items()]


def shown(names: Sequence[str]) -> str:
    """Return names for an error, some of them if there are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"


def _at_last_dot(path: str) -> tuple[str, str]:
    """Return a path without its extension, and the extension in lower case; "" for a name without a dot."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if dot else (path, "")


def _path(name: str) -> str | None:
    """Return a file's path without what stands for the folder itself; None for a hidden file."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") and part != ".." for part in parts) or "__MACOSX" in parts
    return None if hidden or not parts else "/".join(parts)


def _parts(key: str, files: Sequence[_File]) -> Parts:
    texts = [file.member for file in files if file.extension == TEXT]
    recordings = sorted((file for file in files if file.extension in AUDIO), key=lambda file: file.place)
    numbers = [file.place for file in recordings]
    names = tuple(file.member.name for file in files)
    fault = None
    if len(texts) > 1 or len(set(numbers)) < len(numbers):
        fault = f"comes twice ({shown(names)}); ids must be unique: remove one of them"
    elif numbers not in ([-1], list(range(len(numbers)))):
        fault = f"has the files {shown(names)}; number all its recordings from 0, without gaps, as in {key}.0.wav"
    return Parts(key, texts[0] if texts else None, tuple(file.member for file in recordings), fault, names)
