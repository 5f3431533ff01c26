"""Data sets that the `datasets` library saved (`save_to_disk`), read by that library: what state.json names, no more.

Rows are as they are stored: a recording in a column of type Audio is {"bytes": …, "path": …}, not decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError

_BATCH = 1000  # rows
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Return whether a directory is a saved data set, or several splits of one."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def saved_files(path: Path) -> list[Path]:
    """Return the files that hold a saved data set's rows, in their order.

    Raises:
        CordError: it is several splits, or its state is damaged.
    """
    if not (path / _STATE).is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / _STATE).is_file())
        raise CordError(
            f"{path} holds several splits; give the directory of one: {', '.join(splits) or 'none is there'}"
        )
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return [path / str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CordError(f"{path / _STATE} is damaged ({error}); save the data set again") from None


def saved_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a saved data set.

    Raises:
        CordError: it is several splits, damaged, or incomplete.
    """
    missing = [file.name for file in saved_files(path) if not file.is_file()]
    if missing:
        raise CordError(f"{path}: {_STATE} names {missing[0]!r}, which is missing; save the data set again")
    import datasets  # takes seconds, and is needed here alone

    try:
        data = datasets.load_from_disk(str(path))
        for table in data.with_format("arrow").iter(batch_size=_BATCH):
            yield from table.to_pylist()
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are among them
        reason = " ".join(str(error).split())[:120]
        raise CordError(f"{path} cannot be read as a saved data set ({reason}); save it again") from error
