"""Fields of a user's rows: what nothing uses is refused, for a field that is dropped in silence changes the question.

A field without a value, null, counts as not written: Parquet gives every row every column. Notes that nothing shall use
stand under "metadata", or their names are given to be ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

NOTES = "metadata"  #: the field that may hold anything
_SHOWN = 200  # characters


def read_row(text: str) -> Any:
    """Read JSON in which no object has a field twice; of two values Python's reader would drop the first.

    Raises:
        ValueError: it is no JSON, or has such an object, or a text that UTF-8 has no form for.
        RecursionError: it is nested too deeply.
    """
    row = json.loads(text, object_pairs_hook=_object)
    if "\\ud" in text.lower() and (fault := find_surrogate(row)) is not None:  # UTF-8 itself holds none
        raise ValueError(fault)
    return row


def find_surrogate(value: Any) -> str | None:
    """Return that a text of a JSON value has half of a surrogate pair, which no file can hold; None without one."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"a text of it has a lone surrogate ({error.object[error.start]!a}), which is no character"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return row


def find_unused(
    row: Mapping[str, Any], used: Collection[str], *, ignored: Collection[str] = (), how: str = ""
) -> str | None:
    """Return what is wrong with a row that has a field which nothing uses; None for a row without one.

    Args:
        row: of texts and other values.
        used: the names of fields that are read.
        ignored: those that the user said to leave aside.
        how: says how to name such fields, for the message: "--ignore-fields".
    """
    for name, value in row.items():
        if value is None or name in used or name in ignored or name == NOTES:
            continue
        among = f"here (used are {', '.join(sorted(used))})"
        if _is_recording(name, value):
            aside = f", or name it with {how} if the text alone is meant" if how else ""
            return f"its field {name!r} is a recording, which nothing uses {among}; remove it{aside}"
        aside = f", name it with {how} to leave it aside," if how else ""
        return f"its field {name!r} is used by nothing {among}; remove it{aside} or keep it under {NOTES!r}"
    return None


def listed(row: Mapping[str, Any]) -> str:
    """Return the names of a row's fields for an error."""
    return ", ".join(sorted(map(str, row)))[:_SHOWN] or "none"


def _is_recording(name: str, value: Any) -> bool:
    """Return whether a field holds or names a recording: what the `datasets` library calls Audio, or a path of one."""
    if isinstance(value, Mapping):
        return {"bytes", "path"} <= value.keys() or "array" in value
    endings = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aac", ".webm")
    return name.lower() in ("audio", "path") or (isinstance(value, str) and value.lower().endswith(endings))
