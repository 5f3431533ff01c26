"""Decide by its context whether a hyphen between two values is a minus or a "to"; refuse it where neither is sure."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.normaliser import UNIT
from megatron_cord.speech.verbalization.numbers import CURRENCY, FRACTION, NUMBER, SCALE

VALUE = (
    rf"(?:{CURRENCY})?\s?(?:[0-9]+\s{FRACTION}|{FRACTION}|{NUMBER})"
    rf"(?:\s?(?:{UNIT}|[%°$€£¢]|(?:{SCALE})\b)|(?:st|nd|rd|th)\b)?"
)
_VALUE = re.compile(VALUE)
_FAR = 200  # characters on each side in which an expression may lie
_LETTER = (  # a variable; "a" and "I" only beside an operator
    r"(?<![A-Za-z])[b-zB-HJ-Z](?![A-Za-z])|(?<=[-+*/×·÷^=−(0-9])[aAI](?![A-Za-z])"
    r"|(?<![A-Za-z])[aAI](?=\s?[-+*/×·÷^=−)])"
)
_EXPRESSION = re.compile(
    rf"(?:{NUMBER}(?:\s?(?:{UNIT}|(?:{SCALE})\b))?|{_LETTER}|[-+*/×·÷^=−√<>≤≥≠%$€£¢°()½¼¾π!?]|\s)+"
)
_OPERATORS = re.compile(r"[+*×·÷^=−√<>≤≥≠]")
_SUM_BEFORE = re.compile(
    r"(?:\bwhat(?:'s| is| are| does| do)|\bhow (?:much|many) is|\bcalculate|\bcompute|\bevaluate|\bsimplify|\bsolve"
    r"|\bfind|\bwork out|\btell me|\bdetermine|\bgive|\badd|\bsubtract|\bmultiply|\bequals?(?: to)?|\bplus|\bminus"
    r"|\btimes|\bdivided by"
    r"|\b(?:value|result|answer|difference|expression|equation|sum|product)(?: (?:of|to|is|for|in))?)"
    r"(?: the)?\s*:?\s*$",
    re.IGNORECASE,
)
_SUM_AFTER = re.compile(r"\s*(?:is equal|equals?\b|is the same)", re.IGNORECASE)
_RANGE_BEFORE = re.compile(
    r"\b(?:pages?|pp\.?|p\.|chapters?|verses?|lines?|questions?|problems?|exercises?|sections?|items?|rows?|columns?|steps?"
    r"|levels?|grades?|ages?|aged|years?|weeks?|days?|months?|hours?|numbers?|nos?\.|rooms?|figures?|tables?|articles?"
    r"|volumes?|episodes?|lessons?|units?|rounds?|stages?|seasons?|from|between|range(?: of| is)?|about|around"
    r"|approximately|within|every|takes?|lasts?)\s*:?\s*$",
    re.IGNORECASE,
)
_EARLIER_IN_LIST = re.compile(r"(?:[0-9]+(?:\s?-\s?[0-9]+)?\s?(?:,|\band\b|\bor\b)(?:\s?(?:and|or)\b)?\s*)+$")
_SCORE_BEFORE = re.compile(
    r"\b(?:scores?(?: of| is| was)?|scored|won|wins?|lost|loses?|leads?|led|drew|tied|beat (?:\w+ ){1,3}(?:by )?)\s*$",
    re.IGNORECASE,
)
_NOT_COUNTED = "was|has|plus|minus|times|equals|divides|does|this|yields|gives|makes|leaves"
_COUNTED_AFTER = re.compile(
    r"\s*(?:times (?:an?|per|each|every|as|more)|year|month|week|day|hour|minute|second|page|mile|foot|inch|point"
    r"|people|men|women|children|percent|feet|teeth|mice|fish|sheep"
    rf"|(?:[a-z]+ )?(?!(?:{_NOT_COUNTED})\b)[a-z]{{3,}}s)\b"
)
_YEAR = re.compile(r"1[0-9]{3}|20[0-9]{2}")
_DOUBT = "it contains {!r}, whose hyphen may be a minus or a range; write it in words"


def hyphen_between_values(text: str, start: int, end: int) -> str | None:
    """Return "minus", "to" or "and" for the hyphen in text[start:end]; None where no values stand on both sides.

    Raises:
        UnspeakableError: its context leaves doubt.
    """
    left, right = _value_before(text, start), _VALUE.match(text, end + len(text[end:]) - len(text[end:].lstrip()))
    if left is None or right is None:
        return None
    first, last = _expression(text, start)
    before, expression, after = text[max(0, first - _FAR) : first], text[first:last].strip(), text[last : last + _FAR]
    low, high = _size(left), _size(right[0])
    ascending = low is not None and high is not None and low < high
    counted = right[0].rstrip()[-1:] in set("%°$€£") or bool(re.search(r"[A-Za-z]$", right[0]))
    counted = counted or bool(_COUNTED_AFTER.match(text[right.end() :]))
    chained = bool(re.match(r"\s?-\s?[0-9]", text[right.end() :])) or bool(
        re.search(r"[0-9]\s?-\s?$", text[max(0, start - _FAR) : text.rindex(left, 0, start)])
    )
    asked = bool(_SUM_BEFORE.search(before) or _SUM_AFTER.match(after) or expression.endswith(("=", "= ?")))
    if (
        ascending
        and not chained
        and _RANGE_BEFORE.search(_EARLIER_IN_LIST.sub("", before))
        and not _OPERATORS.search(expression)
    ):
        return "and" if before.rstrip().lower().endswith("between") else "to"
    if _OPERATORS.search(expression) or re.search(r"[A-Za-zπ]", re.sub(VALUE, "", expression)):
        return "minus"
    if asked and not (ascending and counted):
        return "minus"
    if stands_alone(text, start) and not ascending and not chained:
        return "minus"  # nothing but "12-7"
    if _SCORE_BEFORE.search(before) and not chained:
        return "to"
    both_years = bool(_YEAR.fullmatch(left.strip()) and _YEAR.fullmatch(right[0].strip()))
    both_money = left.strip()[:1] in set("$€£") and right[0].strip()[:1] in set("$€£")
    if ascending and not chained and not asked and (counted or both_years or both_money):
        return "to"
    raise UnspeakableError(_DOUBT.format(f"{left}{text[start:end]}{right[0]}".strip()))


def in_mathematics(text: str, place: int) -> bool:
    """Tell whether the expression around a place has operators of its own, or is asked for as a sum."""
    first, last = _expression(text, place)
    return bool(_OPERATORS.search(text[first:last]) or asked_for(text, place) or _SUM_AFTER.match(text, last))


def stands_alone(text: str, place: int) -> bool:
    """Tell whether a text is nothing but the expression around a place."""
    first, last = _expression(text, place)
    return not text[:first].strip() and not text[last:].strip(" .?!\n")


def asked_for(text: str, place: int) -> bool:
    """Tell whether the words before the expression around a place ask for its value."""
    first = _expression(text, place)[0]
    return bool(_SUM_BEFORE.search(text[max(0, first - _FAR) : first]))


def word_is_asked_for(text: str, word: str) -> bool:
    """Tell whether a text ends in a word whose value the words before it ask for: "what is revenue"."""
    return bool(_SUM_BEFORE.search(text.rstrip().removesuffix(word)))


def _expression(text: str, place: int) -> tuple[int, int]:
    for match in _EXPRESSION.finditer(text, max(0, place - _FAR), place + _FAR):
        if match.start() <= place < match.end():
            return match.start(), match.end()
    return place, place + 1


def _value_before(text: str, end: int) -> str | None:
    """Return the value that ends where a hyphen begins."""
    end = len(text[:end].rstrip())
    found = [match[0] for match in _VALUE.finditer(text, max(0, end - 40), end) if match.end() == end]
    return found[-1] if found else None


def _size(value: str) -> float | None:
    if re.search(FRACTION, value):
        match = re.search(r"(?:([0-9]+)\s)?([0-9]+)\s?/\s?([0-9]+)", value)
        assert match is not None
        below = int(match[3])
        return None if below == 0 else int(match[1] or "0") + int(match[2]) / below
    match = re.search(NUMBER, value)
    return None if match is None else float(match[0].replace(",", ""))
