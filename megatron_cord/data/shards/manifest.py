"""What a directory of shards holds. The manifest is written last: a directory with one is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_json

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"  #: beside shards that are being made of rows, from their beginning
_FORMAT = 1


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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
            return cls(
                shards=tuple(
                    ShardEntry(str(entry["name"]), int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))
                    for entry in content["shards"]
                ),
                voices=dict(content["voices"]),
                seconds=float(content["seconds"]),
                source=dict(content["source"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise CordError(
                f"{path} is not a manifest of shards ({reason}); delete the directory and make the shards again"
            ) from error


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
