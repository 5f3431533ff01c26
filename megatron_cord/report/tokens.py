"""Tokens with their divergence, in the six steps of the page's colour scale."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_cord.report.charts import format_number

#: Upper ends of the steps, nats. Divergences spread over orders of magnitude, so the steps grow.
LIMITS = (0.01, 0.05, 0.2, 1.0, 3.0)
#: What the legend says of each step.
LEVELS = (f"below {LIMITS[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(LIMITS)), f"{LIMITS[-1]:g} and more")


@dataclass(frozen=True)
class Token:
    """One token as the page shows it.

    Attributes:
        text: what it stands for.
        special: it marks the end or a turn, and is set small.
        level: its step on the scale; None if not measured.
        note: what is said of it on demand.
    """

    text: str
    special: bool
    level: int | None
    note: str


def annotate(tokens: Sequence[str], divergence: Sequence[float], weights: Sequence[float] | None = None) -> list[Token]:
    """Pairs tokens with their divergence (nats) and their weight in the loss; a list that is too short leaves the rest unmeasured."""
    annotated = []
    for position, text in enumerate(tokens):
        value = divergence[position] if position < len(divergence) else math.nan
        notes = [] if math.isnan(value) else [f"{format_number(value)} nats"]
        if weights is not None and position < len(weights) and math.isfinite(weights[position]):
            notes.append(f"weight {format_number(weights[position])}")
        level = None if math.isnan(value) else bisect_right(LIMITS, value)
        special = text.startswith("<") and text.endswith(">")
        annotated.append(Token(text, special, level, ", ".join(notes) or "not measured"))
    return annotated
