"""Plain numbers as exact fractions, however they are written: digits, words, LaTeX, per cent.

Simplification: English words for whole numbers only, and commas only between thousands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_cord.data.number_words import SCALES, TENS, UNITS

_NUMBER_WORDS = {*UNITS, *TENS, *SCALES, "hundred"}
_SIGN_WORDS = {"minus", "negative"}

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_WORDS = (
    rf"\b(?:(?:minus|negative)\s+)?(?:{'|'.join(_NUMBER_WORDS)})(?:[\s-]+(?:and\s+)?(?:{'|'.join(_NUMBER_WORDS)}))*\b"
)
#: Matches a number somewhere in a text: a LaTeX fraction, digits with an optional denominator or per cent sign, or
#: words.
NUMBER_IN_TEXT = re.compile(
    rf"-?\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|(?:(?<![\w.)])-\s?)?\$?(?:{_DIGITS})(?:\s*/\s*\d+)?(?:\s*\\?%)?|{_WORDS}",
    re.IGNORECASE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"(-?)(\d+) (\d+)/(\d+)")
_VALUE = re.compile(rf"([+-]?)\s*((?:{_DIGITS}))(?:\s*/\s*(\d+))?")
_CLUTTER = re.compile(r"\\(?:left|right|text|mathrm|[,;! ])|[${}]")


@dataclass(frozen=True)
class Quantity:
    """A value with its unit, "apple" or "%"; a unit in the plural counts as its singular."""

    value: Fraction
    unit: str = ""

    def agrees(self, other: Quantity) -> bool:
        """Return whether values are equal, and units too unless one is left out.

        50 % agrees with 50 and with 0.5, as answers mean either.
        """
        if self.value == other.value:
            return self.unit == other.unit or not self.unit or not other.unit
        return {self.unit, other.unit} == {"%", ""} and self._share() == other._share()

    def _share(self) -> Fraction:
        return self.value / 100 if self.unit == "%" else self.value


def parse_quantity(text: str) -> Quantity | None:
    """Return the text as one number with an optional unit, or None when it is anything else."""
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    text = " ".join(_CLUTTER.sub(" ", text).replace("\\%", "%").lower().split())
    if mixed := _MIXED.fullmatch(text):
        sign, whole, above, below = mixed.groups()
        return (
            None if int(below) == 0 else Quantity((-1 if sign else 1) * (int(whole) + Fraction(int(above), int(below))))
        )
    if match := _VALUE.match(text):
        sign, digits, below = match.groups()
        if below is not None and int(below) == 0:
            return None
        value = Fraction(digits.replace(",", "")) / int(below or 1)
        return _with_unit(-value if sign == "-" else value, text[match.end() :])
    words = text.replace("-", " ").split()
    count = next((i for i, word in enumerate(words) if word not in _NUMBER_WORDS | _SIGN_WORDS | {"and"}), len(words))
    number = _from_words(words[:count])
    return None if number is None else _with_unit(Fraction(number), " ".join(words[count:]))


def _with_unit(value: Fraction, rest: str) -> Quantity | None:
    unit = rest.strip().rstrip(".")
    if unit in {"%", "percent", "per cent"}:
        return Quantity(value, "%")
    if not re.fullmatch(r"[a-z°²³ ]*", unit):
        return None
    return Quantity(value, unit.removesuffix("s"))


def _from_words(words: list[str]) -> int | None:
    """Return 105000 for "one hundred and five thousand", None for no number or several ("one two")."""
    negative = bool(words) and words[0] in _SIGN_WORDS
    words = words[1:] if negative else words
    total, group, last = 0, 0, None  # ``last`` bounds what may follow: after tens only units, after units nothing
    smallest_scale = 10**15
    for word in words:
        if word == "and":
            continue
        if word in UNITS and (last is None or (last == "tens" and 0 < UNITS[word] < 10)):
            group, last = group + UNITS[word], "units"
        elif word in TENS and last is None:
            group, last = group + TENS[word], "tens"
        elif word == "hundred" and 0 < group < 100:
            group, last = group * 100, None
        elif word in SCALES and group and SCALES[word] < smallest_scale:
            smallest_scale = SCALES[word]
            total, group, last = total + group * smallest_scale, 0, None
        else:
            return None
    if not words or words[-1] == "and" or words[0] == "and":
        return None
    return -(total + group) if negative else total + group
