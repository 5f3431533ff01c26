"""What a run has gained and what it has lost: the change of each accuracy since its first evaluation, with intervals.

The form is that of X-OPD's tables (arXiv 2603.24596): the gain of the skill that is trained, and beside it the drop of
the text and of other skills. Intervals are paired over the questions, as those of the guards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT, GuardConfig
from megatron_cord.evaluation.files import FOLDER, read_result, set_files
from megatron_cord.evaluation.guards import Drop, measure_drop
from megatron_cord.evaluation.results import outcomes_of

_VIEWS: tuple[tuple[Literal["hear", "read"], str], ...] = (("hear", "audio"), ("read", "text"))


@dataclass(frozen=True)
class Limit:
    """What a guard allows.

    Attributes:
        name: of the guard.
        max_drop: a share of the questions.
        held: whether the guard was within its limit; None where it compares with another baseline than this table.
    """

    name: str
    max_drop: float
    held: bool | None


@dataclass(frozen=True)
class Change:
    """How one accuracy has changed since the first evaluation.

    Attributes:
        set: of questions.
        view: hear or read.
        drop: since the first evaluation; negative where the accuracy has risen.
        limits: of the guards that watch it.
    """

    set: str
    view: Literal["hear", "read"]
    drop: Drop
    limits: tuple[Limit, ...] = ()

    @property
    def interval(self) -> tuple[float, float, float]:
        """The change and both ends of its 95 % interval, shares; positive where the accuracy has risen."""
        return 0.0 - self.drop.drop, 0.0 - self.drop.high, 0.0 - self.drop.low

    @property
    def verdict(self) -> str:
        """What the interval shows."""
        if self.drop.high < 0:
            return "gained"
        return "lost" if self.drop.low > 0 else "no difference shown"


def read_changes(run: Path, first: int, last: int, guards: Any) -> tuple[Change, ...]:
    """Return the changes between two evaluations of a run, the trained skill first; none of a set that one lacks.

    Args:
        run: its directory.
        first: the step of its first evaluation.
        last: the step of the weights that count.
        guards: `evaluation.guards` of its configuration as plain maps; anything else stands for none.

    Raises:
        CordError: a result is damaged, with its name.
    """
    names = sorted(path.stem for path in (run / FOLDER).glob(f"step_{last:06d}/*.json") if path.stem != "results")
    changes = []
    for name in sorted(names, key=lambda each: each != HELDOUT):
        files = set_files(run, name)
        if first not in files or last == first:
            continue
        before, after = (_outcomes(files[step]) for step in (first, last))
        for view, modality in _VIEWS:
            if before[modality].keys() & after[modality].keys():
                drop = measure_drop(before[modality], after[modality])
                changes.append(Change(name, view, drop, _limits(guards, name, view, drop)))
    return tuple(changes)


def _limits(guards: Any, name: str, view: str, drop: Drop) -> tuple[Limit, ...]:
    found = []
    for guard, settings in guards.items() if isinstance(guards, Mapping) else ():
        if not isinstance(settings, Mapping) or (settings.get("set"), settings.get("view", "read")) != (name, view):
            continue
        try:
            config = GuardConfig(**settings)
        except (TypeError, CordError) as error:
            raise CordError(f"config.yaml: evaluation.guards.{guard} is damaged ({error}); restore the file") from None
        found.append(Limit(guard, config.max_drop, None if config.baseline else not drop.exceeds(config)))
    return tuple(found)


def _outcomes(path: Path) -> Mapping[str, Mapping[str, float]]:
    stat = path.stat()
    return _read_outcomes(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)  # a live page reads the run again and again, and these files are large and written once
def _read_outcomes(path: Path, changed: int, size: int) -> Mapping[str, Mapping[str, float]]:
    rows = read_result(path).get("answers", [])
    try:
        return {modality: outcomes_of(rows, modality) for _, modality in _VIEWS}
    except (TypeError, KeyError, ValueError) as error:
        raise CordError(f"{path}: its answers are damaged ({error!r}); remove the file, or evaluate again") from None
