"""Patterns by which settings name parameters and modules of the whole model, and what a wrong one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern is the name, a module that it lies in, or a shell pattern that fits it."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def nearest(pattern: str, names: Collection[str]) -> str | None:
    """Return the name with a run of words that contains, or is most like, the pattern without its stars."""
    wanted = pattern.strip("*.")
    runs: dict[str, str] = {}
    for name in names:
        words = name.split(".")
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                runs.setdefault(".".join(words[start:end]), name)
    containing = min((run for run in runs if wanted in run), key=len, default=None)
    found = [containing] if containing else difflib.get_close_matches(wanted, runs, n=1)
    return runs[found[0]] if found else None
