"""Data sets of the Hugging Face Hub, streamed by the `datasets` library: nothing is downloaded before it is read.

The revision is decided at the beginning and kept in the set's plan, so that an interrupted set goes on with the same
rows, from the place at which it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_cord.data.hub_rows import first_line, open_split
from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.speech.recordings.sources.source import Source


class HubRows(Source):
    """Rows of one split of a data set.

    Args:
        address: hf://OWNER/NAME[@REVISION].
        split, subset: needed where there are several.
        commit: the revision that was read before.

    Raises:
        CordError: there is no such set, revision, split or subset, or the hub is away.
    """

    is_streamed = True

    def __init__(self, address: str, split: str | None, subset: str | None, commit: str | None) -> None:
        opened = open_split(address, subset, split, commit=commit, how="choose with --{}:")
        self.name, self._rows, self._data, self.root = address, 0, opened.data, opened.root
        self.identity = {"revision": opened.commit, "subset": opened.subset, "split": opened.split}

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        try:
            for row in self._data:
                self._rows += 1
                yield f"row {self._rows}", row
        except ImportError as error:
            raise CordError(
                f"{self.name}: {first_line(error)} Or give hf://OWNER/NAME@refs/convert/parquet, a copy that the hub "
                "makes of most sets"
            ) from None
        except Exception as error:  # of no common kind; what the rows are used for raises elsewhere
            raise CordError(
                f"{self.name}: cannot be read behind row {self._rows} ({first_line(error)}); what is complete is "
                "kept: call again when the hub is well"
            ) from None

    def count(self) -> int | None:
        """Implement `Source.count`."""
        splits = self._data.info.splits or {}
        split = splits.get(self.identity["split"])
        return None if split is None else split.num_examples

    def bookmark(self) -> Any:
        """Implement `Source.bookmark`."""
        return {"rows": self._rows, "state": self._data.state_dict()}

    def resume(self, bookmark: Any) -> None:
        """Implement `Source.resume`."""
        self._rows = int(bookmark["rows"])
        self._data.load_state_dict(bookmark["state"])
