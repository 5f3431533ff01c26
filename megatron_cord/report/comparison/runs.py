"""The runs of a comparison, and the names by which the page tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.report.page.charts import MOST_RUNS


def check_runs(directories: Sequence[Path]) -> None:
    """Refuse what cannot be compared. Raises CordError: too many runs, or one of them twice."""
    if len(directories) > MOST_RUNS:
        raise CordError(f"{len(directories)} runs on one page cannot be told apart; give {MOST_RUNS} at most")
    seen: dict[Path, Path] = {}
    for directory in directories:
        if (first := seen.setdefault(directory.resolve(), directory)) is not directory:
            raise CordError(f"{first} and {directory} are the same run; give each once")


def labels(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart: their names, if these differ."""
    parts = [directory.resolve().parts for directory in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]
