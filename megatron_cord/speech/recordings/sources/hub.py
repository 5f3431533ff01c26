"""Data sets of the Hugging Face Hub, streamed by the `datasets` library: nothing is downloaded before it is read.

The revision is decided at the beginning and kept in the set's plan, so that an interrupted set goes on with the same
rows, from the place at which it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.speech.recordings.sources.source import Source

PREFIX = "hf://"
_NAME = re.compile(r"hf:/{1,2}(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")


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
        named = _NAME.fullmatch(address)
        if named is None:
            raise CordError(f"{address}: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
        import datasets
        from huggingface_hub import HfApi

        self.name, self._rows = address, 0
        where = f"hf://datasets/{named['name']}"  # never a directory of that name
        try:
            commit = commit or HfApi().dataset_info(named["name"], revision=named["revision"]).sha
            subset = _only(datasets.get_dataset_config_names(where, revision=commit), subset, "subset", address)
            splits = datasets.get_dataset_split_names(where, subset, revision=commit)
            split = _only(splits, split, "split", address)
            data = datasets.load_dataset(where, subset, split=split, revision=commit, streaming=True)
            features = data.features or {}
            for column, kind in features.items():
                if isinstance(kind, datasets.Audio):
                    data = data.cast_column(column, datasets.Audio(decode=False))
        except CordError:
            raise
        except Exception as error:  # requests', the hub's and the library's own are of no common kind
            raise CordError(f"{address}: the hub does not give it ({_first_line(error)}); check the name") from None
        self._data, self.root = data, f"{where}@{commit}"
        self.identity = {"revision": commit, "subset": subset, "split": split}

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        try:
            for row in self._data:
                self._rows += 1
                yield f"row {self._rows}", row
        except ImportError as error:
            raise CordError(
                f"{self.name}: {_first_line(error)} Or give hf://OWNER/NAME@refs/convert/parquet, a copy that the hub "
                "makes of most sets"
            ) from None
        except Exception as error:  # as above; what the rows are used for raises elsewhere
            raise CordError(
                f"{self.name}: cannot be read behind row {self._rows} ({_first_line(error)}); what is complete is "
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


def _only(there: list[str], given: str | None, what: str, address: str) -> str:
    """Return the one that is given, or the only one."""
    if given is None and len(there) == 1:
        return there[0]
    if given in there:
        return str(given)
    problem = f"has several {what}s" if given is None else f"has no {what} {given!r}"
    raise CordError(f"{address} {problem}; choose with --{what}: {', '.join(sorted(there))}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
