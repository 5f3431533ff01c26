"""Tokens with their divergence and their weight, each in the six steps of the page's colour scale."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_cord.report.page.charts import format_number

#: Upper ends of the steps, nats. Divergences spread over orders of magnitude, so the steps grow.
LIMITS = (0.01, 0.05, 0.2, 1.0, 3.0)
#: The same for weights in the loss: the paper's lie between 1 and 4.
WEIGHT_LIMITS = (1.0, 1.25, 1.5, 2.0, 3.0)


def _names(limits: Sequence[float]) -> tuple[str, ...]:
    return (
        f"below {limits[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in pairwise(limits)),
        f"{limits[-1]:g} and more",
    )


#: The steps in words, for the legends.
LEVELS, WEIGHT_LEVELS = _names(LIMITS), _names(WEIGHT_LIMITS)


@dataclass(frozen=True)
class Token:
    """One token as the page shows it.

    Attributes:
        text: of the token.
        special: whether it marks the end or a turn, and is set small.
        level: its step on the scale of divergences; None if not measured.
        weight_level: its step on the scale of weights; None where it has none.
        note: both values, shown on demand.
    """

    text: str
    special: bool
    level: int | None
    weight_level: int | None
    note: str


def annotate(tokens: Sequence[str], divergence: Sequence[float], weights: Sequence[float] | None = None) -> list[Token]:
    """Pair tokens with their divergence (nats) and their weight in the loss; the rest of a short list is unmeasured."""
    annotated = []
    for position, text in enumerate(tokens):
        value, weight = _at(divergence, position), _at(weights or (), position)
        notes = [] if value is None else [f"{format_number(value)} nats"]
        if weight is not None:
            notes.append(f"weight {format_number(weight)}")
        special = text.startswith("<") and text.endswith(">")
        annotated.append(
            Token(
                text, special, _level(LIMITS, value), _level(WEIGHT_LIMITS, weight), ", ".join(notes) or "not measured"
            )
        )
    return annotated


def _at(values: Sequence[float], position: int) -> float | None:
    value = values[position] if position < len(values) else math.nan
    return None if math.isnan(value) else value


def _level(limits: Sequence[float], value: float | None) -> int | None:
    return None if value is None else bisect_right(limits, value)
