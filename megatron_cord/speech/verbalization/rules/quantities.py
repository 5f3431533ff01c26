"""Money, units, telephone numbers and ordinals."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.hyphens import asked_for, in_mathematics
from megatron_cord.speech.verbalization.latex import END, START
from megatron_cord.speech.verbalization.normaliser import UNIT, telephone_words, unit_words
from megatron_cord.speech.verbalization.numbers import (
    CURRENCY,
    FRACTION,
    NUMBER,
    SCALE,
    amount_words,
    money_words,
    number_words,
    ordinal_words,
    scaled_words,
)
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule

_APART = r"(?<![\w.,])"  # before a number that nothing touches
_PER = (
    r"second|minute|hour|day|night|week|month|year|person|people|student|child|customer|item|piece|unit|page|word|mile"
    r"|kilometer|meter|foot|kilogram|gram|pound|ounce|liter|gallon|dozen|ticket|bottle|box|bag"
)
_SPACE = rf"[\s{START}{END}]*"


def _money(place: Place) -> str:
    sign, minus, number, scale = place.match.groups()
    if re.match(r"\.?[0-9]|,[0-9]", place.after):
        raise UnspeakableError(f"it contains {(place.match[0] + place.after[:4]).strip()!r}, which is no number")
    return f" {'minus ' if minus else ''}{money_words(sign, number, scale)} "


def _money_after(place: Place) -> str:
    number, scale, sign = place.match.groups()
    return f" {money_words(sign, number, scale)} "


def _money_range(place: Place) -> str | None:
    sign, low, high, scale = place.match.groups()
    if asked_for(place.text, place.match.start()) or float(low.replace(",", "")) >= float(high.replace(",", "")):
        return None
    return f" {number_words(low)} to {money_words(sign, high, scale)} "


def _scaled(place: Place) -> str:
    return f" {scaled_words(*place.match.groups())} "


def _cents(place: Place) -> str:
    return f" {number_words(place.match[1])} {'cent' if place.match[1] == '1' else 'cents'} "


def _per_slash(place: Place) -> str | None:
    return " per " if re.search(rf"(?:[0-9][kMB]?|\b{UNIT}|[a-z]s|[$€£])\s?$", place.before) else None


def _telephone(place: Place) -> str | None:
    return None if asked_for(place.text, place.match.start()) else f" {telephone_words(place.match[0])} "


def _inches(place: Place) -> str:
    return f" {number_words(place.match[1])} {'inch' if place.match[1] == '1' else 'inches'} "


def _feet_and_inches(place: Place) -> str:
    feet, inches = place.match.groups()
    return (
        f" {number_words(feet)} {unit_words('ft', many=feet != '1')}"
        f" {number_words(inches)} {'inch' if inches == '1' else 'inches'} "
    )


def _measure(place: Place) -> str | None:
    number, unit = place.match.groups()
    attached = place.match[0][place.match[0].rindex(unit) - 1].isdigit()
    if len(unit) == 1 and (attached or place.in_formula or in_mathematics(place.text, place.match.start())):
        return None  # "3m + 2m" is about a letter
    singular = number == "1" or bool(re.fullmatch(FRACTION, number))
    return f" {amount_words(number)} {unit_words(unit, many=not singular)} "


def _measure_adjective(place: Place) -> str:
    return f" {number_words(place.match[1])}-{unit_words(place.match[2], many=False)} "


def _ordinal(place: Place) -> str:
    return f" {ordinal_words(place.match[1])} "


def _idiom(place: Place) -> str | None:
    if in_mathematics(place.text, place.match.start()) or place.in_formula:
        return None
    raise UnspeakableError(f"it contains {place.match[0]!r}, which may be a fraction or a saying")


QUANTITIES: tuple[Rule, ...] = (
    rule(rf"({CURRENCY})({NUMBER})\s?-\s?(?:\1)?({NUMBER})(?:\s?({SCALE})(?!\w))?", _money_range),
    rule(
        rf"({CURRENCY})\s?([-−]?)({NUMBER})(?:(?:{_SPACE}|-)({SCALE})(?!\w))?(?:\s(?:dollars?|euros?|pounds?)\b)?",
        _money,
    ),
    rule(rf"{_APART}({NUMBER})\s?(?:({SCALE})\s?)?([$€£¥₹])(?![\w])", _money_after),
    rule(rf"{_APART}({NUMBER})([kKMB])(?=\s(?:dollars|euros|pounds|people|users|views)\b)", _scaled),
    rule(rf"{_APART}({NUMBER})\s?¢", _cents),
    rule(rf"\s?/\s?(?=(?:{_PER})\b)", _per_slash),
    rule(r"(?<![\w-])(?:\+?1[- ])?(?:\([0-9]{3}\) ?|[0-9]{3}[- ])[0-9]{3}-[0-9]{4}(?![\w-])", _telephone),
    rule(rf"{_APART}({NUMBER})\s?in\.?(?=\s(?:long|wide|tall|high|deep|thick)\b)", _inches),
    rule(rf"{_APART}({NUMBER})\s?ft\.?\s({NUMBER})\s?in(?:\.(?=\s[a-z]))?(?!\w)", _feet_and_inches),
    rule(rf"(?<![\w.,])((?:[0-9]+\s+)?{FRACTION}|{NUMBER}){_SPACE}({UNIT})", _measure),
    rule(r"(?<![\w.,])([0-9]{1,9})(?:st|nd|rd|th)(?!\w)", _ordinal, re.IGNORECASE),
    rule(r"(?<!\w)(?:24/7|9/11|([0-9]+)/\1)(?![\w/])", _idiom),
    rule(rf"(?<![\w.,])([0-9]+)-({UNIT}{{1}})(?<=[A-Za-z]{{2}})(?!\w)", _measure_adjective),
)
