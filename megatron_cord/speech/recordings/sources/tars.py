"""Webdatasets of any program: tars in which the files of a sample have one name, and extensions tell what they are.

A recording is known by its extension, and may be any that shards may have. The fields of `{key}.json` are fields of the
row; `{key}.txt` is the transcript; any other file is a field with the name of its extension. The key is the id unless
the JSON has one.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cord.data.fields import read_row
from megatron_cord.data.question_files import Reject
from megatron_cord.data.shards.members import AUDIO, TEXT, read_members
from megatron_cord.errors import CordError
from megatron_cord.speech.recordings.audio import RecordedMember
from megatron_cord.speech.recordings.sources.source import Source

_TRANSCRIPT = "txt"
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_ENDINGS = (".tar", ".tgz", *(f".tar{ending}" for ending in _PACKED))


class TarRows(Source):
    """Rows of one or more tars.

    Args:
        path: a tar, a directory of tars, or a pattern.

    Raises:
        CordError: there are none, or they are compressed.
    """

    def __init__(self, path: str) -> None:
        self._tars = find_tars(path)
        self.name = Path(path).name
        self.root = Path(path).parent
        self.identity = {}  # rows name their tar: others may be added

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        for tar in self._tars:
            try:
                with tar.open("rb") as file:
                    members, problem = read_members(file, tar)
                    for key, files in _grouped(members).items():
                        yield f"{tar.name}, sample {key}", _row(file, tar, key, files)
            except OSError as error:
                problem = f"cannot be read ({error.strerror}); check that it is a file and may be read"
            if problem is not None:
                yield tar.name, Reject(tar.name, f"the tar {problem}")


def is_tar(path: Path) -> bool:
    """Return whether a path, or a pattern, has the name of a tar, compressed or not."""
    return path.name.removesuffix("*").endswith(_ENDINGS)


def find_tars(path: str) -> list[Path]:
    """Return the tars of a path in their order; none for a directory without any.

    Raises:
        CordError: they are compressed, or a pattern matches nothing.
    """
    given = Path(path)
    found = sorted(filter(is_tar, given.iterdir()) if given.is_dir() else map(Path, glob.glob(path)))  # noqa: PTH207
    if not found and not given.is_dir():
        raise CordError(f"{path}: no such file; check the path")
    if packed := next((tar for tar in found if tar.name.endswith((*_PACKED, ".tgz"))), None):
        raise CordError(f"{packed} is compressed, so that no sample in it can be found; unpack it to a plain .tar")
    return found


def _grouped(members: Sequence[tarfile.TarInfo]) -> dict[str, dict[str, list[tarfile.TarInfo]]]:
    """Return the files by key and extension; hidden ones are none."""
    grouped: dict[str, dict[str, list[tarfile.TarInfo]]] = {}
    for member in members:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        if name.startswith(".") or "__MACOSX" in folder:
            continue
        stem, _, extension = name.partition(".")
        if extension.rpartition(".")[2].lower() in (*AUDIO, TEXT, _TRANSCRIPT):  # dots in the name
            stem, _, extension = name.rpartition(".")
        key = f"{folder}/{stem}" if folder else stem
        grouped.setdefault(key, {}).setdefault(extension.lower(), []).append(member)
    return grouped


def _row(file: BinaryIO, tar: Path, key: str, files: dict[str, list[tarfile.TarInfo]]) -> dict[str, Any] | Reject:
    if twice := next((extension for extension, members in files.items() if len(members) > 1), None):
        return Reject(key, f"it has two files of one kind (.{twice})")
    found = {extension: members[0] for extension, members in files.items()}
    recordings = [extension for extension in found if extension in AUDIO]
    if len(recordings) > 1:
        return Reject(key, f"it has several recordings ({', '.join(recordings)})")
    row: dict[str, Any] = {"id": key}
    try:
        if TEXT in found:
            content = read_row(_content(file, found[TEXT]).decode("utf-8-sig"))
            if not isinstance(content, dict):
                return Reject(key, "its JSON is no object")
            row |= content
        if _TRANSCRIPT in found:
            row["question"] = _content(file, found[_TRANSCRIPT]).decode("utf-8-sig")
    except (ValueError, RecursionError) as error:
        return Reject(key, f"its text is not JSON, or not UTF-8 ({str(error)[:80]})")
    for extension, member in found.items():
        if extension in AUDIO:
            row["audio"] = RecordedMember(tar, member.name, member.offset_data, member.size, float(member.mtime))
        elif extension not in (TEXT, _TRANSCRIPT):
            row[extension] = f"the file {member.name}"
    return row


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)
