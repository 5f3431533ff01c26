"""Files of rows: JSON Lines, Parquet, or a data set that the `datasets` library saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cord.data.question_files import Reject, count_rows, question_files, read_rows
from megatron_cord.speech.recordings.sources.source import Source


class FileRows(Source):
    """Rows of a file, or of the files in a directory. Paths of recordings are relative to its directory.

    Raises:
        CordError: it is missing, or holds several splits.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.root = path if path.is_dir() else path.parent
        self.identity = {}
        self._path = path
        question_files(path)  # refuses what cannot be read before anything is made

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        return read_rows(self._path)

    def count(self) -> int | None:
        """Implement `Source.count`."""
        return count_rows(self._path)
