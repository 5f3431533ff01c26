"""The interface of a source: rows in a fixed order, read one after the other and never held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cord.data.question_files import Reject


class Source(ABC):
    """Where rows come from.

    Attributes:
        name: for messages and the manifest: a file's name, without the directories above it.
        root: what paths of recordings are relative to: a directory, or an address that they may not leave.
        identity: what else decides which rows these are, as JSON values.
        is_streamed: rows are dear to read again, and reading can go on at a bookmark.
    """

    name: str
    root: Path | str
    identity: Mapping[str, Any] = {}
    is_streamed: bool = False

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Yield every row with its place ("line 12"), or why it is none.

        Raises:
            CordError: the source is missing or damaged as a whole.
        """

    def count(self) -> int | None:
        """Return how many rows there are, where that is known without reading them."""
        return None

    def bookmark(self) -> Any:
        """Return where reading goes on behind the last row, as a JSON value; of a streamed source alone."""
        raise NotImplementedError

    def resume(self, bookmark: Any) -> None:
        """Have `rows` begin at a bookmark; of a streamed source alone."""
        raise NotImplementedError
