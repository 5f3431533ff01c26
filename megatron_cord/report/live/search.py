"""Search in a run's rollout dump: by text, role, reward, divergence, length and step.

A dump may have thousands of files. At most `WINDOW` of them, the newest in the given range, are searched for one page,
and the page shows which; a summary of each file is kept in memory, as a file does not change once it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.report.run.contents import TrainingRollout
from megatron_cord.report.run.reading import read_rollouts

WINDOW = 200  # steps
PAGE = 30  # rollouts


@dataclass(frozen=True)
class _Brief:
    """The properties by which a rollout is found; ``row`` is its place in the step's file."""

    step: int
    row: int
    role: str
    reward: float | None
    divergence: float | None
    length: int
    text: str


#: How found rollouts can be ordered; the newest step comes first within equals.
ORDERS: Mapping[str, Callable[[_Brief], float]] = {
    "newest first": lambda b: 0.0,
    "largest divergence": lambda b: -math.inf if b.divergence is None else b.divergence,
    "longest": lambda b: b.length,
    "shortest": lambda b: -b.length,
    "lowest reward": lambda b: -math.inf if b.reward is None else -b.reward,
    "highest reward": lambda b: -math.inf if b.reward is None else b.reward,
}


@dataclass(frozen=True)
class Query:
    """A query; None sets no condition. Bounds are inclusive, and values that were not measured lie outside of any."""

    text: str = ""  #: in question, response, teacher's answer or id, whatever the case
    role: str = ""  #: distill, policy, shared or replaced
    reward_from: float | None = None
    reward_to: float | None = None
    divergence_from: float | None = None  #: mean over the response's tokens, nats
    divergence_to: float | None = None
    length_from: float | None = None  #: tokens
    length_to: float | None = None
    step_from: float | None = None
    step_to: float | None = None
    order: str = "newest first"  #: a key of ORDERS
    skip: float | None = None  #: so many of those found

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> Query:
        """Return the query of a form's fields; unknown ones are ignored.

        Raises:
            CordError: no number where one belongs, or an unknown order.
        """
        known = {field.name: field.type for field in fields(cls)}
        parsed = {
            name: value.strip() if known[name] == "str" else _number(name, value)
            for name, value in values.items()
            if name in known
        }
        query = cls(**{name: value for name, value in parsed.items() if value is not None})  # type: ignore[arg-type]
        if query.order not in ORDERS:
            raise CordError(f"there is no order {query.order!r}; choose one of {', '.join(ORDERS)}")
        return query


@dataclass(frozen=True)
class Found:
    """One page of the rollouts that match.

    Attributes:
        rollouts: those shown.
        count: of all that match within the steps searched.
        steps: the first and the last step searched; None where no step was dumped.
        earlier: the step at which the search continues; None at the dump's beginning.
    """

    rollouts: Sequence[TrainingRollout]
    count: int
    steps: tuple[int, int] | None
    earlier: int | None


def search(files: Mapping[int, Path], query: Query) -> Found:
    """Search the newest steps of the given range. Raises CordError for a damaged file, with its name."""
    low, high = query.step_from or 0, math.inf if query.step_to is None else query.step_to
    asked = [step for step in sorted(files, reverse=True) if low <= step <= high]
    looked, rest = asked[:WINDOW], asked[WINDOW:]
    hits = [brief for step in looked for brief in _brief(files[step]) if _matches(brief, query)]
    hits.sort(key=lambda brief: (-ORDERS[query.order](brief), -brief.step))  # stable: within a step as in its file
    skip = max(int(query.skip or 0), 0)
    opened: dict[int, list[TrainingRollout]] = {}
    shown = []
    for brief in hits[skip : skip + PAGE]:
        if brief.step not in opened:
            opened[brief.step] = read_rollouts(files[brief.step])
        shown.append(opened[brief.step][brief.row])
    return Found(shown, len(hits), (looked[-1], looked[0]) if looked else None, rest[0] if rest else None)


def mean_divergence(rollout: TrainingRollout) -> float | None:
    """Return the mean over the tokens that were measured, nats; None if none was."""
    values = [value for value in rollout.token_kl or () if math.isfinite(value)]
    return sum(values) / len(values) if values else None


def _matches(brief: _Brief, query: Query) -> bool:
    return (
        query.text.casefold() in brief.text
        and query.role in ("", brief.role)
        and _within(brief.reward, query.reward_from, query.reward_to)
        and _within(brief.divergence, query.divergence_from, query.divergence_to)
        and _within(brief.length, query.length_from, query.length_to)
    )


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def _brief(path: Path) -> Sequence[_Brief]:
    stat = path.stat()
    return _briefs(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4000)
def _briefs(path: Path, changed: int, size: int) -> Sequence[_Brief]:
    return [
        _Brief(
            r.step,
            row,
            r.role,
            r.reward,
            mean_divergence(r),
            len(r.tokens),
            "\n".join([r.id, r.question, r.response, r.reference_answer or ""]).casefold(),
        )
        for row, r in enumerate(read_rollouts(path))
    ]


def _number(name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CordError(f"{name.replace('_', ' ')}: {text[:40]!r} is no number")
    return value
