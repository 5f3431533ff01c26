r"""Numbers as exact fractions with their units: "2½ cups", "seven thousand", "\frac{3}{4}", "$1.2M", "50 %".

A text is a number as a whole or not at all: no value is taken from a part of it. Simplification: commas stand between
thousands only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_cord.reward.wording.notation import normalized, plain_fractions
from megatron_cord.reward.wording.units import CURRENCIES, NO_UNIT, PERCENT, PLACE, Unit, currency_unit, read_unit
from megatron_cord.reward.wording.words import (
    MOST_WORDS,
    SCALES,
    is_number_word,
    ordinal_number,
    read_number,
    split_word,
)

LONGEST_NUMBER = 200  #: characters; a longer text is no number

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_TEN_TO = r"\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*\{?"
_LEADING = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:us)?(?P<currency>[{CURRENCIES}]?)\s*(?P<inner>-?)"
    r"(?:(?P<whole>[0-9]+)(?:\s+and)?\s+(?P<above>[0-9]+)\s*/\s*(?P<below>[0-9]+)"
    rf"|(?P<digits>{DIGITS})(?:(?:e|{_TEN_TO})(?P<exponent>[+-]?[0-9]{{1,3}})\}}?(?![0-9a-z])"
    r"|\s*/\s*(?P<over>[0-9]+(?:,[0-9]{3})*))?)"
    r"(?![0-9/]|[.,:][0-9])"
)
_LARGE = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
_ATTACHED_SCALE = re.compile(r"[-+]?[0-9.,]+[KMBT]")  # "5M" is no 5 meters; of money it is read as millions
_CODES = {"usd": "$", "eur": "€", "gbp": "£"}
_ORDINAL = re.compile(r"(?:the )?([0-9]+)(?:st|nd|rd|th)")
_PARTS = re.compile(r"\s*(?:,\s*)?(?:and\s+)?(?=[0-9a-z])")


@dataclass(frozen=True)
class Quantity:
    """A value with its unit, "apple" or "%"."""

    value: Fraction
    unit: Unit = NO_UNIT

    def agrees(self, other: Quantity) -> bool:
        """Return whether values are equal, in units of the same measure, or with one unit left out.

        50 % agrees with 50 and with 0.5, as answers mean either.
        """
        if self.unit == NO_UNIT or other.unit == NO_UNIT:
            if self.value == other.value:
                return True
            return PERCENT in (self.unit, other.unit) and self._share() == other._share()
        factor = self.unit.factor_to(other.unit)
        return factor is not None and self.value * factor == other.value

    def _share(self) -> Fraction:
        return self.value / 100 if self.unit == PERCENT else self.value


def parse_quantity(text: str) -> Quantity | None:
    """Return the text as one number with an optional unit, or None when it is anything else."""
    if len(text) > LONGEST_NUMBER:
        return None
    text = plain_fractions(normalized(text)).strip("{} ")
    if _ATTACHED_SCALE.fullmatch(text):
        return None
    text = text.lower()
    if place := _ORDINAL.fullmatch(text):
        return Quantity(Fraction(int(place[1])), PLACE)
    return _in_digits(text) or _in_words(text)


def _in_digits(text: str) -> Quantity | None:
    text = re.sub(r"^(usd|eur|gbp) ?(?=[0-9.])", lambda m: _CODES[m[1]], text)
    match = _LEADING.match(re.sub(r"^(?:minus|negative) (?=[0-9.$])", "-", text))
    if match is None:
        return None
    text = match.string
    value = _value(match)
    if value is None:
        return None
    if match["sign"] == "-" or match["inner"]:
        value = -value
    rest = text[match.end() :]
    currency = match["currency"]
    if currency and (large := re.match(r"\s?(mn|bn|[kmb])\b\s*", rest)):
        value, rest = value * _LARGE[large[1]], rest[large.end() :]
    if not currency and rest.strip()[:1] in CURRENCIES and rest.strip():
        currency, rest = rest.strip()[0], rest.strip()[1:]  # "5$"
    attached = bool(rest) and not rest[0].isspace()
    words = rest.replace("-", " - ").split() if not attached else rest.split()
    if not attached:
        value, words = _scaled(value, words)
    return _with_unit(value, " ".join(words), currency, attached)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["whole"]:
        above, below = int(match["above"]), int(match["below"])
        return int(match["whole"]) + Fraction(above, below) if 0 < above < below else None
    value = Fraction(match["digits"].replace(",", ""))
    if match["exponent"]:
        return value * Fraction(10) ** int(match["exponent"])
    over = int((match["over"] or "1").replace(",", ""))
    return value / over if over else None


def _scaled(value: Fraction, words: list[str]) -> tuple[Fraction, list[str]]:
    """Apply the number words that follow digits: "million", "dozen", "thirds", "and a half"."""
    if words[:1] == ["and"] and value.denominator == 1:
        for count in range(min(len(words), 5), 1, -1):
            part = read_number(words[1:count])
            if part is not None and 0 < part < 1:
                value, words = value + (part if value >= 0 else -part), words[count:]
                break
    elif words and words[0] not in SCALES and words[0] not in {"quarter", "quarters"}:
        part = read_number(["one", words[0].removesuffix("s") if words[0] != "halves" else "half"])
        if part is not None and part < 1 and value.denominator == 1:
            value, words = value * part, words[1:]
    while words and words[0] in SCALES:
        value, words = value * SCALES[words[0]], words[1:]
    return value, _of(words) if words[:1] == ["of"] else words


def _in_words(text: str) -> Quantity | None:
    words = [part for word in text.split()[: MOST_WORDS + 8] for part in split_word(word)]
    place = ordinal_number(words[1:] if words[:1] == ["the"] else words)
    if place is not None:
        return Quantity(Fraction(place), PLACE)
    if not words or not (words[0] in {"minus", "negative", "a", "an", "point"} or is_number_word(words[0])):
        return None
    for count in range(min(len(words), MOST_WORDS), 0, -1):
        value = read_number(words[:count])
        if value is not None:
            return _with_unit(value, " ".join(_of(words[count:]) if value < 1 else words[count:]), "", False)
    return None


def _of(words: list[str]) -> list[str]:
    """Return the words behind a share without "of the" or "an": "half an hour"."""
    words = words[1:] if words[:1] == ["of"] else words
    return words[1:] if words[:1] in (["the"], ["a"], ["an"]) and len(words) > 1 else words


def _with_unit(value: Fraction, rest: str, currency: str, attached: bool) -> Quantity | None:
    unit = currency_unit(currency, rest) if currency else read_unit(rest, attached=attached)
    return _compound(value, rest) if unit is None and not currency else None if unit is None else Quantity(value, unit)


def _compound(value: Fraction, rest: str) -> Quantity | None:
    """Return the sum of parts in falling units of one measure: "2 hours and 30 minutes"."""
    first, _, others = rest.strip().partition(" ")
    unit = read_unit(first.rstrip(","))
    if unit is None or unit in (NO_UNIT, PERCENT) or not others:
        return None
    part = parse_quantity(others[match.end() :] if (match := _PARTS.match(others)) else others)
    factor = None if part is None or part.unit == NO_UNIT else part.unit.factor_to(unit)
    if part is None or factor is None or factor >= 1 or part.value < 0:
        return None
    return Quantity(value + part.value * factor * (1 if value >= 0 else -1), unit)
