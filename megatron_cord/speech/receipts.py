"""What became of a shard that is made of a user's rows: its receipt, and the parts of a shard that is costly to make.

A receipt is written after its shard, so that a shard with a receipt is whole, and a set can be taken up after a kill at
any moment.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from megatron_cord.data.question_files import Reject
from megatron_cord.data.shards.manifest import ShardEntry
from megatron_cord.data.shards.writer import disk_errors, write_shard
from megatron_cord.runtime.files import write_atomic

Item = TypeVar("Item")


@dataclass(frozen=True)
class Receipt:
    """What became of a shard's rows.

    Attributes:
        shard: None when every row was rejected.
        voices: samples by voice.
        seconds: of audio.
        rejects: in the rows' order.
        rows: stands for the rows where these may change between two calls; else empty.
    """

    shard: ShardEntry | None
    voices: dict[str, int]
    seconds: float
    rejects: list[Reject]
    rows: str = ""

    @classmethod
    def read(cls, directory: Path, name: str, rows: str | None = "") -> Receipt | None:
        """Read the receipt of a finished shard.

        Args:
            directory: of the set.
            name: of the shard, without an extension.
            rows: what the receipt must stand for; None takes any.

        Returns:
            None if the shard is to be made, or made again because it was made of other rows, or its file is gone or of
            another size.
        """
        try:
            content = json.loads(receipt_file(directory, name).read_text(encoding="utf-8"))
            shard = None if content["shard"] is None else ShardEntry(**content["shard"])
            receipt = cls(
                shard,
                dict(content["voices"]),
                float(content["seconds"]),
                [Reject(**r) for r in content["rejects"]],
                str(content.get("rows", "")),
            )
            if shard is not None and (directory / shard.name).stat().st_size != shard.bytes:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return receipt if rows in (None, receipt.rows) else None

    def write(self, directory: Path, name: str) -> None:
        """Write it for `read`."""
        with disk_errors(directory):
            write_atomic(receipt_file(directory, name), json.dumps(asdict(self)))


@dataclass
class Part:
    """Some rows of a shard: encoded samples, and the entries of a receipt."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    voices: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    rejects: list[Reject] = field(default_factory=list)


def receipt_file(directory: Path, name: str) -> Path:
    """Return the file of a receipt."""
    return directory / f"{name}.receipt.json"


def make_with_receipt(
    directory: Path,
    name: str,
    batches: Iterable[Sequence[Item]],
    make: Callable[[Sequence[Item]], Part],
    *,
    keep_parts: bool,
    rejects: Sequence[Reject] = (),
    rows: str = "",
) -> Receipt:
    """Make a shard part by part, each written before the next is made, and its receipt.

    Args:
        directory: of the set.
        name: of the shard.
        batches: what the parts are made of.
        make: makes one.
        keep_parts: keep finished parts beside the shard until it is whole, for parts that cost time or money.
        rejects: found before.
        rows: see `Receipt`.
    """
    whole = Part(rejects=list(rejects))

    def samples() -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(batches):
            part = _read_part(directory, name, number, rows) if keep_parts else None
            if part is None:
                part = make(batch)
                if keep_parts:
                    _write_part(directory, name, number, part, rows)
            whole.voices.update(part.voices)
            whole.seconds += part.seconds
            whole.rejects += part.rejects
            yield from part.samples

    encoded = samples()
    first = next(encoded, None)
    path = directory / f"{name}.tar"
    if first is None:
        with disk_errors(directory):
            path.unlink(missing_ok=True)  # made of other rows
        shard = None
    else:
        shard = write_shard(path, chain([first], encoded))
    receipt = Receipt(shard, dict(whole.voices), whole.seconds, whole.rejects, rows)
    receipt.write(directory, name)
    for part_file in directory.glob(f".{name}.part-*"):
        part_file.unlink()
    return receipt


def _write_part(directory: Path, name: str, number: int, part: Part, rows: str) -> None:
    """Write a small shard with a receipt, as the whole one will be: an endpoint that fails later costs nothing."""
    part_name = f".{name}.part-{number:03d}"
    shard = write_shard(directory / f"{part_name}.tar", part.samples) if part.samples else None
    Receipt(shard, dict(part.voices), part.seconds, part.rejects, rows).write(directory, part_name)


def _read_part(directory: Path, name: str, number: int, rows: str) -> Part | None:
    receipt = Receipt.read(directory, f".{name}.part-{number:03d}", rows)
    if receipt is None:
        return None
    samples: dict[str, dict[str, Any]] = {}
    if receipt.shard is not None:
        with tarfile.open(directory / receipt.shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None  # write_shard writes files alone
                samples.setdefault(key, {"__key__": key})[extension] = content.read()
    return Part(list(samples.values()), Counter(receipt.voices), receipt.seconds, receipt.rejects)
