"""Decide what is spoken for a pair of brackets: nothing, a pause, or "open parenthesis … close parenthesis"."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.hyphens import asked_for
from megatron_cord.speech.verbalization.latex import END, START
from megatron_cord.speech.verbalization.numbers import FRACTION, NUMBER, is_named

_PAIRS = {"(": ")", "[": "]"}
_NAMES = {"(": "parenthesis", "[": "bracket"}
_ATOM = re.compile(rf"\s*[−-]?\s?(?:{NUMBER}|[A-Za-zπ])\s*")
_FRACTION = re.compile(rf"\s*({FRACTION})\s*")
_FUNCTION = re.compile(r"(?<![A-Za-z])[fghFGHP]$")
_OPERATORS = set("+*/×÷·^=−√<>≤≥≠±")


def bracket_words(text: str, place: int, *, in_formula: bool) -> str:
    """Return the words for the bracket at a place.

    Raises:
        UnspeakableError: it has no partner where this matters.
    """
    partner = _partner(text, place)
    if partner is None:
        if in_formula or text[place] in "([":
            raise UnspeakableError(f"its bracket {text[place]!r} has no partner")
        return ", "  # "a) … b) …"
    first, last = min(place, partner), max(place, partner)
    words = _pair_words(text, first, last, in_formula=in_formula)
    return words[0] if place == first else words[1]


def _pair_words(text: str, first: int, last: int, *, in_formula: bool) -> tuple[str, str]:
    content = text[first + 1 : last]
    before, after = text[:first].strip(START + END), text[last + 1 :].strip(START + END)
    touch_before, touch_after = before[-1:], after[:1]
    left, right = before.rstrip()[-1:], after.lstrip()[:1]
    if not in_formula and len(touch_before) == 1 and touch_before.isalpha() and content in {"s", "es"}:
        return "", ""  # "apple(s)"
    is_mathematical = (
        in_formula
        or touch_before.isalnum()
        or touch_before in {")", "_"}
        or (left in _OPERATORS or right in _OPERATORS or (right == "-" and re.search(r"[0-9+*/^=−]", content)))
        or re.search(r"(?:^|[\s\w)\]%°(-])-\s*$", before) is not None
        or touch_after.isalnum()
        or touch_after == "("
    )
    if not is_mathematical:
        pause = " " if asked_for(text, first) and re.search(r"[0-9a-z]\s?[-+*/×÷·^−]\s?[0-9a-z]", content) else ", "
        return pause, pause
    if text[first] == "(" and _is_one_value(content):
        is_argument = touch_before in {"^", "_", "√"} or touch_before == ""
        is_followed = bool(touch_after.isalnum() or touch_after in {"(", "!", "^"} or after.lstrip()[:2] == "**")
        if is_argument and not is_followed:
            return " ", " "
        if _FUNCTION.search(before) and not is_followed:
            return " of ", " "
        if not touch_before.isalnum() and touch_before != ")" and not is_followed:
            return " ", " "
        if re.search(r"(?:sin|cos|tan|log|ln|sqrt)$", before) and not is_followed:
            return " ", " "
        if touch_after.isalpha() and not touch_before.isalnum() and _FRACTION.fullmatch(content):
            return " ", " "  # "(1/2)x"
    name = _NAMES[text[first]]
    opening = "of " if _FUNCTION.search(before) and touch_before.isalpha() else ""
    return f" {opening}open {name} ", f" close {name} "


def _is_one_value(content: str) -> bool:
    if _ATOM.fullmatch(content):
        return True
    fraction = _FRACTION.fullmatch(content)
    return bool(fraction and is_named(*(part.strip() for part in fraction[1].split("/"))))


def _partner(text: str, place: int) -> int | None:
    character = text[place]
    opening = character if character in _PAIRS else next(o for o, c in _PAIRS.items() if c == character)
    closing, step = _PAIRS[opening], 1 if character in _PAIRS else -1
    depth = 0
    for at in range(place, len(text) if step == 1 else -1, step):
        depth += {opening: step, closing: -step}.get(text[at], 0)
        if depth == 0:
            return at
    return None
