"""Whether two free answers mean the same: numbers, ratios, times, dates and expressions by value, else as written.

An answer has a kind and a value as a whole, or none of both; what has none is compared as it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_cord.reward.expressions import equal_expressions
from megatron_cord.reward.moments import CalendarDate, TimeOfDay, parse_date, parse_time, spoken_year
from megatron_cord.reward.numbers import Quantity, parse_quantity
from megatron_cord.reward.ratios import parse_ratio
from megatron_cord.reward.stated import LONGEST_ANSWER
from megatron_cord.reward.wording.notation import normalized
from megatron_cord.reward.wording.units import NO_UNIT

#: Match a letter alone, and one with a text; "J. K. Rowling" has initials.
LETTER = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
LETTERED = re.compile(r"\(?([A-J])(?:\)|[.:])\s+(?![A-Z]\.)(\S.*)")


@dataclass(frozen=True)
class Lettered:
    """A choice where the choices are not known: its letter, with its text if that stands beside it."""

    letter: str
    text: str = ""

    def agrees(self, other: Lettered) -> bool:
        """Return whether letters are equal, and texts too unless one is left out."""
        return self.letter == other.letter and (not (self.text and other.text) or self.text == other.text)


def same_answer(a: str, b: str) -> bool:
    """Return whether two final answers to a question without choices mean the same."""
    if not a.strip() or not b.strip():
        return False
    if _plain(a) == _plain(b):
        return True
    if max(len(a), len(b)) > LONGEST_ANSWER:
        return False
    ratios = parse_ratio(a), parse_ratio(b)
    if any(ratios):
        one, other = (ratio or parse_ratio(text, called=True) for ratio, text in zip(ratios, (a, b), strict=True))
        return one is not None and one == other
    first, second = _value(a), _value(b)
    if any(_is_year(spoken, value) for spoken, value in ((a, second), (b, first))):
        return True
    if isinstance(first, Quantity) and isinstance(second, Quantity):
        return first.agrees(second)
    if isinstance(first, Lettered) and isinstance(second, Lettered):
        return first.agrees(second)
    if first is not None and second is not None:
        return first == second
    if isinstance(first or second, (TimeOfDay, CalendarDate)):
        return False
    return equal_expressions(_expression(a, first), _expression(b, second))


def _value(answer: str) -> Quantity | TimeOfDay | CalendarDate | Lettered | None:
    return parse_time(answer) or parse_date(answer) or parse_quantity(answer) or _lettered(answer)


def _expression(answer: str, value: object) -> str:
    return str(value.value) if isinstance(value, Quantity) and value.unit == NO_UNIT else normalized(answer)


def _is_year(spoken: str, value: object) -> bool:
    return isinstance(value, Quantity) and value.unit == NO_UNIT and value.value == spoken_year(spoken)


def _lettered(answer: str) -> Lettered | None:
    answer = " ".join(answer.split())
    if match := LETTER.fullmatch(answer):
        return Lettered(match[1].upper())
    match = LETTERED.fullmatch(answer)
    return Lettered(match[1], _plain(match[2])) if match else None


def _plain(answer: str) -> str:
    """Return what is compared where an answer has no value; never empty for an answer that is not."""
    return normalized(answer).strip(" .!?\"'*").casefold() or " ".join(answer.split())
