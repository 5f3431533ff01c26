"""What to write in the place of a key that does not exist: its new name, its name here, or the key that it resembles.

A suggestion that misleads is worse than none: sections are never proposed, and a key only if it has the same last name
or nearly the same letters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from megatron_cord.config.renamed import RENAMED
from megatron_cord.config.synonyms import SYNONYMS

#: Of the letters of two dotted keys, or of two last names, the share that must agree in their order.
_PATH_SIMILARITY, _NAME_SIMILARITY = 0.8, 0.8
#: Last names that mean something else in each section.
_GENERIC = frozenset((
    "address", "beta", "directory", "enabled", "format", "interval", "keep", "kind", "mode", "model", "name", "path",
    "samples", "stream", "timeout", "weight", "window",
))  # fmt: skip
_KEY_IN_SENTENCE = re.compile(r"\b[a-z]\w*(?:\.\w+)+")


def renamed(path: str) -> str | None:
    """Return the new name of a key, or of one inside a renamed section; None if it was not renamed."""
    if path in RENAMED:
        return RENAMED[path]
    section, dot, name = path.rpartition(".")
    above = renamed(section) if dot else None
    return f"{above}.{name}" if above is not None and " " not in above else above


def suggest(path: str, keys: Collection[str]) -> str:
    """Return what follows "unknown key …" in the message: "; did you mean 'a.b'?", a sentence, or nothing.

    Args:
        path: the dotted key that does not exist.
        keys: the dotted names of those that do, without sections.
    """
    new = renamed(path)
    if new is not None and (" " in new or any(key == new or key.startswith(f"{new}.") for key in keys)):
        return f"; it is now {new}" if " " in new else f"; it is now '{new}'"
    name = path.rpartition(".")[2]
    for foreign in (path.lower(), name.lower()):
        here = SYNONYMS.get(foreign, "")
        if here in keys:
            return f"; did you mean '{here}'?"
        if " " in here and all(key in keys for key in _KEY_IN_SENTENCE.findall(here)):
            return f"; {here}"
    found = _resembling(path, name, keys)
    return f"; did you mean {' or '.join(repr(key) for key in found)}?" if found else ""


def explain_foreign(name: str) -> str | None:
    """Return how another trainer's key is written here: a key, or a sentence; None for a name that is not known."""
    return SYNONYMS.get(name.lower()) or SYNONYMS.get(name.rpartition(".")[2].lower())


def _resembling(path: str, name: str, keys: Collection[str]) -> list[str]:
    """Return the key that looks like `path`, or those of the same last name, three at most."""
    last = {key: key.rpartition(".")[2] for key in keys}
    same = [key for key in keys if last[key] == name]
    near = max(keys, key=lambda key: _ratio(path, key), default="")
    if near and _ratio(path, near) >= _PATH_SIMILARITY and _ratio(name, last[near]) >= 0.5:
        return [near]
    if same:
        return same if len(same) <= 3 and (name not in _GENERIC or "." not in path) else []
    near = max(keys, key=lambda key: _ratio(name, last[key]), default="")
    return [near] if near and len(name) > 3 and _ratio(name, last[near]) >= _NAME_SIMILARITY else []


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
