"""How long a set of recordings will take and how large it will be, measured on some of its rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.speech.estimate import Estimate, measure, project
from megatron_cord.speech.recordings.config import RecordingSetConfig
from megatron_cord.speech.recordings.recording_set import make_from
from megatron_cord.speech.recordings.sources.open_source import open_source
from megatron_cord.speech.recordings.sources.source import Source


class _SomeRows(Source):
    """Rows of another source: every k-th."""

    def __init__(self, source: Source, step: int, count: int) -> None:
        self.name, self.root, self.identity = source.name, source.root, source.identity
        self._source, self._step, self._count = source, step, count

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        return islice(self._source.rows(), 0, self._step * self._count, self._step)


def plan_recording_set(config: RecordingSetConfig, count: int, *, workers: int = 1) -> Estimate:
    """Make a set of `count` rows, taken evenly from the whole source, in a directory that is then removed.

    Of a set on the hub the first rows are taken.

    Raises:
        CordError: fewer than one row, or what `make_recording_set` raises.
    """
    if count < 1:
        raise CordError(f"{count} rows to measure with; give at least 1")
    source = open_source(config)
    total = source.count()
    if total is None and not source.is_streamed:
        total = sum(1 for _ in source.rows())
    tried = count if total is None else min(count, total)
    step = 1 if source.is_streamed or total is None else max(1, total // max(1, tried))
    with tempfile.TemporaryDirectory(prefix="megatron_cord-plan-") as folder:
        sample = replace(config, max_rejects=1.0, shard_size=max(1, min(config.shard_size, tried // (4 * workers))))
        made, rate = measure(
            lambda progress: make_from(
                _SomeRows(source, step, tried), sample, Path(folder) / "set", workers=workers, progress=progress
            ),
            tried,
        )
        tried = made.manifest.samples + sum(made.rejects.values())
    return project(made, rate, tried=tried, workers=workers, usable=tried if total is None else total)
