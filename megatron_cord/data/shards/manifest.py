"""What a directory of shards holds. The manifest is written last: a directory with one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, write_json

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"  #: beside shards that are being made of rows, from their beginning
_FORMAT = 1
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: file name inside the directory.
        samples: how many it holds.
        bytes: its size.
        sha256: of the whole file, in hexadecimal digits.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All shards.

    Attributes:
        shards: in the order of the samples.
        voices: how many samples each voice speaks; samples without a voice are left out.
        seconds: of audio, altogether.
        source: the arguments that the shards were made with, as JSON values.
    """

    shards: tuple[ShardEntry, ...]
    voices: Mapping[str, int]
    seconds: float
    source: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)

    def write(self, directory: Path) -> None:
        """Write ``manifest.json``, complete or absent."""
        content = {"format": _FORMAT, "samples": self.samples, **asdict(self)}
        write_json(directory / MANIFEST_NAME, content, sync=True)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            CordError: when it is missing or not a manifest.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise CordError(f"{directory} has no {MANIFEST_NAME}: {_what_else(directory)}")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> Manifest:
        """Return the manifest that a file holds.

        Raises:
            CordError: it is none; `where` names it.
        """
        try:
            plain = json.loads(content.decode("utf-8"))
            if plain["format"] != _FORMAT:
                raise ValueError(f"format {plain['format']!r}, expected {_FORMAT}")
            return cls(
                shards=tuple(
                    ShardEntry(
                        _file_name(entry["name"]),
                        int(entry["samples"]),
                        int(entry["bytes"]),
                        _checksum(entry["sha256"]),
                    )
                    for entry in plain["shards"]
                ),
                voices=dict(plain["voices"]),
                seconds=float(plain["seconds"]),
                source=dict(plain["source"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise CordError(
                f"{where} is not a manifest of shards ({reason}); delete the directory and make the shards again"
            ) from error


def is_remote(path: str) -> bool:
    """Return whether the path of a set is an address, of whose shards local copies are made."""
    return _ADDRESS.match(path) is not None


def shard_fault(shard: Path, listed: ShardEntry, *, verify: bool) -> str | None:
    """Return how a shard differs from what the manifest says; None if it does not.

    Args:
        shard: its file.
        listed: what the manifest says.
        verify: compare the checksum, too, for which the file is read.
    """
    if not shard.is_file():
        return "is missing, but the manifest lists it; restore it or make the shards again"
    size = shard.stat().st_size
    if size != listed.bytes:
        return f"has {size} of {listed.bytes} bytes: truncated or changed; restore it or make the shards again"
    if verify and file_digest(shard) != listed.sha256:
        return "does not have the checksum that the manifest lists; restore it or make the shards again"
    return None


def _file_name(name: str) -> str:
    """Return the name of a shard, which must not lead out of the directory."""
    if not name or Path(name).name != name:
        raise ValueError(f"the shard {name!r} is no plain file name")
    return name


def _checksum(digits: str) -> str:
    """Return a SHA-256, which names local copies."""
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError(f"{digits!r:.80} is no SHA-256")
    return digits


def _what_else(directory: Path) -> str:
    """Return what a directory without a manifest is, and what to do with it."""
    if (directory / PLAN_NAME).is_file():
        return "it is incomplete; run the same command again, which makes the rest"
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if any(name.endswith(".tar") for name in names):
        return (
            "it is incomplete, or a set that another program made; to read all its shards give the pattern "
            f"'{directory}/*.tar'"
        )
    found = ", ".join(names[:8]) or "nothing"
    return f"it holds no shards (found: {found}); give the directory of a set, or a pattern of its tar files"
