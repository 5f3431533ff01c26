"""Minus signs, hyphens and dashes."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.hyphens import hyphen_between_values, in_mathematics, word_is_asked_for
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule

_NEGATED_WORD = re.compile(r"\s*(?:[0-9.$€£(√π]|[A-Za-z](?![A-Za-z]))")


def _dash(place: Place) -> str:
    if re.search(r"[0-9)]\s*$", place.before) or re.match(r"\s*[0-9(]", place.after):
        raise UnspeakableError("it contains '--' beside a number")
    return ", "


def _hyphen(place: Place) -> str:
    between = hyphen_between_values(place.text, place.match.start(), place.match.end())
    if between is not None:
        return f" {between} "
    before = re.search(r"([^\W\d_]+|[\w)\]%°]+)?(\s*)$", place.before)
    after = re.match(r"(\s*)([^\W\d_]+|\S)?", place.after)
    assert before is not None
    assert after is not None
    left, right = before[1] or "", after[2] or ""
    attached = not before[2] and not after[1]
    if re.match(r"\s+-\s?(?:[0-9.($]|[A-Za-z](?![A-Za-z]))", place.after):
        return " minus "  # "3 - -5"
    is_word = [side.isalpha() and (len(side) > 1 or (side in "aAI" and not attached)) for side in (left, right)]
    if not left or (before[2] and not after[1]):
        return _sign(place, left)
    if attached and any(is_word):
        return "-"  # "well-known", "5-year-old", "covid-19", "x-ray"
    is_sum = in_mathematics(place.text, place.match.start())
    if any(is_word):
        is_sum = is_sum or ("=" in place.text and all(is_word))
        return _dash_or_minus(is_word, left, right, is_sum=is_sum, is_asked=word_is_asked_for(place.before, left))
    capitals = [side for side in (left, right) if side.isalpha() and side.isupper()]
    letters = left.isalpha() and right.isalpha()
    if is_sum or (not capitals and not (letters and attached)):
        return " minus "
    raise UnspeakableError(f"it contains {left + place.match[0] + right!r}, whose hyphen may be a minus")


def _sign(place: Place, left: str) -> str:
    if _NEGATED_WORD.match(place.after):
        return " minus "
    raise UnspeakableError(f"it contains a hyphen after {left or 'nothing'!r}, which may be a minus or a dash")


def _dash_or_minus(is_word: list[bool], left: str, right: str, *, is_sum: bool, is_asked: bool) -> str:
    if is_sum:
        return " minus "
    if (all(is_word) and not is_asked) or (right[:1].isupper() and is_word[1]):
        return ", "
    raise UnspeakableError(f"it contains a hyphen between {left!r} and {right!r}, which may be a minus or a dash")


DASHES: tuple[Rule, ...] = (
    rule(r"\s*--+\s*", _dash),
    rule(r"\s*−\s*", lambda place: " minus "),
    rule(r"-", _hyphen),
)
