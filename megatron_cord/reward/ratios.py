"""Ratios and odds: "2:4", "the ratio of 1 to 2", "3 to 1 odds".

"9:15" is a time and "3 to 5" a range, unless they are called a ratio or compared with one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_cord.reward.moments import parse_time
from megatron_cord.reward.numbers import parse_quantity
from megatron_cord.reward.wording.notation import normalized, plain_fractions
from megatron_cord.reward.wording.units import NO_UNIT

_LONGEST = 100  # characters
_CALLED = re.compile(
    r"^(?:(?:in |at )?(?:the |a |an )?(?:ratio|odds)(?: (?:of|is|are)|:)? |)(.*?)(?: \(?(?:ratio|odds)\)?|)$"
)
_BETWEEN = re.compile(r"\s*:\s*|\s+to\s+|\s*\\colon\s*")


@dataclass(frozen=True)
class Ratio:
    """Its terms, of which the first is 1 or 0."""

    terms: tuple[Fraction, ...]


def parse_ratio(text: str, *, called: bool = False) -> Ratio | None:
    """Return the text as a ratio; None for anything else.

    Args:
        text: an answer.
        called: whatever can be one is one ("9:15", "3 to 5", "3/5"), as what it is compared with is a ratio.
    """
    if len(text) > _LONGEST:
        return None
    text = plain_fractions(normalized(text)).lower()
    called = called or re.search(r"\b(?:ratio|odds)\b", text) is not None
    if not called and (":" not in text or parse_time(text) or re.fullmatch("[0-9]{1,2}(?::[0-9]{2})+", text)):
        return None
    body = match[1] if (match := _CALLED.match(text)) else text
    parts = _BETWEEN.split(body)
    if len(parts) == 1 and called:
        parts = body.split("/")
    values = [quantity.value for quantity in map(parse_quantity, parts) if quantity and quantity.unit == NO_UNIT]
    if len(parts) < 2 or len(values) < len(parts) or not any(values):
        return None
    first = next(value for value in values if value)
    return Ratio(tuple(value / first for value in values))
