"""Make shards of recordings: in parallel, taken up where it was interrupted, with a reason for all that is left out.

Row number i goes to shard i // shard_size. This process reads and checks the rows, one after the other; workers decode.
A receipt stands for the rows that its shard was made of, so a file of rows may be corrected or continued: shards whose
rows are the same stay.

What it simplifies: a recording that is changed under its name is not noticed, unless it was left out before: then the
shard is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_cord.data.question_files import Reject
from megatron_cord.data.shards.manifest import MANIFEST_NAME
from megatron_cord.data.shards.writer import disk_errors
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import fingerprint, write_json
from megatron_cord.speech.receipts import Receipt, receipt_file
from megatron_cord.speech.recordings.config import RecordingSetConfig
from megatron_cord.speech.recordings.job import RecordingJob, make_recording_shard
from megatron_cord.speech.recordings.rows import Recording, checked_rows, rows_fingerprint, safe_id
from megatron_cord.speech.recordings.seen_ids import SeenIds
from megatron_cord.speech.recordings.sources.open_source import open_source
from megatron_cord.speech.recordings.sources.source import Source
from megatron_cord.speech.shard_set import ShardSet, claim, complete, make_all, read_plan

Progress = Callable[[int, int | None], None]


def make_recording_set(
    config: RecordingSetConfig, output: str | Path, *, workers: int = 1, progress: Progress | None = None
) -> ShardSet:
    """Make the set, or what is missing of it.

    Args:
        config: where the rows come from, and what a recording must be like.
        output: a directory; complete and half-made sets of the same configuration are taken up.
        workers: processes.
        progress: called with (rows done since the last call, rows of the source or None if unknown).

    Raises:
        CordError: the directory holds a set of other arguments, the source cannot be read, a row has a field that
            nothing uses, the recognizer or the disk fails, or too many rows were left out. Finished shards stay.
    """
    output = Path(output)
    source = open_source(config, read_plan(output))
    return make_from(source, config, output, workers=workers, progress=progress)


def make_from(
    source: Source, config: RecordingSetConfig, output: Path, *, workers: int = 1, progress: Progress | None = None
) -> ShardSet:
    """Make the set of a source, as `make_recording_set` does."""
    settings = _settings(source, config)
    at = config.source if source.is_streamed else str(Path(config.source).resolve())
    moved = claim(output, settings, noted={"path": at}) != {"path": at}
    total = source.count()
    report = progress if progress is not None else lambda done, total: None
    receipts: dict[str, Receipt] = {}
    report(0, total)
    jobs = _jobs(source, config, output, receipts, report, total, moved)
    for job, receipt in make_all(jobs, make_recording_shard, workers, weigh=lambda job: job.bytes):
        receipts[job.name] = receipt
        report(len(job.rows), total)
    if not receipts:
        raise CordError(f"{config.source} has no rows; write one JSON object a line, with 'audio' and 'question'")
    ordered = [receipts[name] for name in sorted(receipts)]
    settings["rows_fingerprint"] = fingerprint(receipt.rows for receipt in ordered)
    made = complete(output, settings, ordered, max_rejects=config.max_rejects, what="rows")
    _clean(output, len(receipts))
    return made


def _settings(source: Source, config: RecordingSetConfig) -> dict[str, Any]:
    """Return what decides about the set's content beside its rows, for its manifest."""
    quality = asdict(config.quality)
    del quality["max_characters"]  # of a question that is to be spoken
    settings = {"from": source.name, **source.identity, "fields": dict(config.fields), "language": config.language}
    plain: dict[str, Any] = json.loads(json.dumps({**settings, "shard_size": config.shard_size, "quality": quality}))
    return plain


def _jobs(
    source: Source,
    config: RecordingSetConfig,
    output: Path,
    receipts: dict[str, Receipt],
    report: Progress,
    total: int | None,
    moved: bool,
) -> Iterator[RecordingJob]:
    """Yield the shards to make, and fill in the receipts of those that are there."""
    seen = SeenIds()
    number = _resume(source, output, receipts, seen)
    report(number * config.shard_size, total)
    rows = checked_rows(source, config, seen)
    while block := tuple(islice(rows, config.shard_size)):
        name = _name(number)
        if source.is_streamed:
            with disk_errors(output):
                write_json(_bookmark_file(output, number + 1), source.bookmark())
        stands_for = rows_fingerprint(block)
        receipt = Receipt.read(output, name, stands_for)
        if receipt is not None and not _repaired(output, name, receipt, block):
            receipts[name] = receipt
            report(len(block), total)
        else:
            if moved and Receipt.read(output, name, None) not in (None, receipt):
                raise CordError(
                    f"{output} holds shards of other rows than those of {config.source}, which has the same name; "
                    "delete it or choose another directory"
                )
            with disk_errors(output):
                (output / MANIFEST_NAME).unlink(missing_ok=True)  # what it lists is about to change
            yield RecordingJob(output, name, block, stands_for, config)
        number += 1


def _resume(source: Source, output: Path, receipts: dict[str, Receipt], seen: SeenIds) -> int:
    """Have a source that is dear to read go on behind its first finished shards; return how many these are."""
    if not source.is_streamed:
        return 0
    number = 0
    there: dict[str, Receipt] = {}
    while (receipt := Receipt.read(output, _name(number), None)) is not None:
        there[_name(number)] = receipt
        number += 1
    while number and not _bookmark_file(output, number).is_file():
        number -= 1
    if number == 0:
        return 0
    source.resume(json.loads(_bookmark_file(output, number).read_text(encoding="utf-8")))
    for name in [_name(i) for i in range(number)]:
        receipts[name] = there[name]
        for sample_id in _ids(output, there[name]):
            seen.add(safe_id(sample_id))
    return number


def _ids(output: Path, receipt: Receipt) -> Iterator[str]:
    """Yield the ids of a shard's rows."""
    import tarfile

    yield from (reject.id for reject in receipt.rejects)
    if receipt.shard is not None:
        with tarfile.open(output / receipt.shard.name) as tar:
            yield from (member.name.partition(".")[0] for member in tar if member.name.endswith(".json"))


def _repaired(output: Path, name: str, receipt: Receipt, block: Sequence[Recording | Reject]) -> bool:
    """Return whether a file of a row that was left out has changed, or appeared, since then."""
    left_out = {reject.id for reject in receipt.rejects}
    written = receipt_file(output, name).stat().st_mtime
    return any(
        recorded.file.stat().st_ctime > written
        for row in block
        if isinstance(row, Recording) and row.sample.id in left_out
        for recorded in row.recorded
        if recorded.file is not None and recorded.file.is_file()
    )


def _clean(output: Path, shards: int) -> None:
    """Remove all bookmarks but the one behind the last shard, and shards of rows that the source has no more."""
    with disk_errors(output):
        for path in output.glob(".shard-*.bookmark.json"):
            if path != _bookmark_file(output, shards):
                path.unlink()
        for path in output.glob("shard-*"):
            if path.name.partition(".")[0] >= _name(shards):
                path.unlink()


def _name(number: int) -> str:
    return f"shard-{number:06d}"


def _bookmark_file(output: Path, number: int) -> Path:
    return output / f".{_name(number)}.bookmark.json"
