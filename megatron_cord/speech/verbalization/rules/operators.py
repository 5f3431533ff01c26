"""Operators of mathematics: each needs a value on both sides."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.brackets import bracket_words
from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.hyphens import in_mathematics, stands_alone
from megatron_cord.speech.verbalization.numbers import NUMBER, number_words
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule

_LEFT = re.compile(r"[\w)\]%°∞!?$€£¢]")  # what a value may end with
_RIGHT = re.compile(r"[\w(\[.√∞$€£−+?~-]")  # what a value may begin with
_OPERATORS_BY_WORDS = {
    "times": "× · *",
    "divided by": "÷",
    "is at most": "≤ <=",
    "is at least": "≥ >=",
    "is not equal to": "≠ !=",
    "is about": "≈",
    "equals": "=",
    "is less than": "<",
    "is greater than": ">",
}
_OPERATORS = {symbol: words for words, symbols in _OPERATORS_BY_WORDS.items() for symbol in symbols.split()}
_SHAPES = re.compile(
    r"\s*-?(?:by|grid|matri|rectang|array|board|table|square|room|photo|paper|card|tile|block|inch|block)"
)
_POWER = r"\s*(?:\^|\*\*)\s*"


def _small_power(place: Place) -> str | None:
    power = place.match[1] or place.match[2]
    return f" {'squared' if power == '2' else 'cubed'} " if _is_base(place) else None


def _power(place: Place) -> str:
    if not _is_base(place) or not _RIGHT.match(place.right):
        raise UnspeakableError(f"it contains {place.match[0].strip()!r} without a base or an exponent")
    return " to the power of "


def _is_base(place: Place) -> bool:
    return bool(re.search(r"[\w)\]∞]$", place.before.rstrip()))


def _index(place: Place) -> str:
    index = place.match[1] or place.match[2]
    words = "" if index is None else number_words(index) if index.isdigit() else index
    if re.search(r"\blog\s*$", place.before):
        return f" base {words} {'of' if words else ''} "
    if not re.search(r"(?<![^\W\d_])[^\W\d_]\s*$", place.before) or re.match(r"[^\W\d_]{2,}", place.after):
        raise UnspeakableError("it contains an underscore")
    return f" sub {words} "


def _bracket(place: Place) -> str:
    return bracket_words(place.text, place.match.start(), in_formula=place.in_formula)


def _operator(place: Place) -> str:
    symbol = place.match[1]
    asks = place.right == "?" or place.after.strip() == ""
    if symbol == "=" and _LEFT.match(place.left or " ") and asks:
        return " equals "
    if not _LEFT.match(place.left or " ") or not _RIGHT.match(place.right or " "):
        raise UnspeakableError(f"it contains {symbol!r} without a value on each side")
    if symbol == "×" and _is_shape(place):
        return " by "
    return f" {_OPERATORS[symbol]} "


def _is_shape(place: Place) -> bool:
    following = re.match(rf"\s?(?:{NUMBER})", place.after)
    return bool(following and _SHAPES.match(place.after[following.end() :]))


def _letter_x(place: Place) -> str | None:
    if place.in_formula:
        return None
    if _is_shape(place):
        return " by "
    if in_mathematics(place.text, place.match.start()) or stands_alone(place.text, place.match.start()):
        return " times "
    raise UnspeakableError("it contains an 'x' between numbers, which may be a letter, 'times' or 'by'")


def _plus(place: Place) -> str:
    if not _RIGHT.match(place.right or " ") or "+" in {place.left, place.right}:
        raise UnspeakableError(f"it contains {place.match[1]!r} without a value after it")
    return " plus " if place.match[1] == "+" else " plus or minus "


def _slash(place: Place) -> str:
    before = re.search(r"([^\W\d_]+|[\w)\]%.!]+)\s*$", place.before)
    after = re.match(r"\s*(?:([^\W\d_]+)|[\w(√.−-])", place.after)
    if before is None or after is None:
        raise UnspeakableError("it contains a slash without a value on each side")
    words = (before[1].lower(), (after[1] or "").lower())
    if words == ("and", "or"):
        return " "
    if any(len(word) > 1 and word.isalpha() and word not in {"pi", "sqrt"} for word in words) or words == ("n", "a"):
        raise UnspeakableError("it contains a slash between words")
    letters = place.left.isupper() and place.right.isupper()
    if letters and not place.in_formula and not in_mathematics(place.text, place.match.start()):
        raise UnspeakableError("it contains a slash between capitals, which may be a division or an abbreviation")
    if re.search(r"/\s?[\w.]+\s*$", place.before):
        raise UnspeakableError("it contains a division of a division")
    return " over "


OPERATORS: tuple[Rule, ...] = (
    rule(rf"{_POWER}(?:\(([23])\)|([23])(?![0-9.,][0-9]|[0-9]))(?!{_POWER})", _small_power),
    rule(_POWER, _power),
    rule(r"_(?:\(([0-9]+|[A-Za-z])\)|([0-9]+|[A-Za-z])(?![A-Za-z]))?", _index),
    rule(r"[()\[\]]", _bracket),
    rule(r"\s*(<=|>=|!=|[×·*÷≤≥≠≈=<>])(?![=<>])\s*", _operator),
    rule(r"(?<=[0-9])\s?[xX]\s?(?=[0-9])", _letter_x),
    rule(r"\s*([+±])\s*", _plus),
    rule(r"\s*/\s*", _slash),
)
