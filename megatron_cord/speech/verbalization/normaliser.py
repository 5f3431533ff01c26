"""Dates, years, clock times, telephone numbers, units and titles, read by wetext, whose package has its grammars.

It gets one expression at a time, of a class that it was found to read rightly ("5 m" would be minutes to it, "1980s"
seconds); values come from `numbers`, so that they are spoken everywhere in one way.
"""

from __future__ import annotations

import datetime
import functools
import re
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.numbers import ordinal_words

MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    *("november", "december"),
)
MONTH = (
    "January|February|March|April|May|June|July|August|September|October|November|December"
    r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec)\b\.?"
)
#: Units that wetext knows.
_KNOWN = (
    "km cm mm nm mi ft yd kg g mg lb oz ml h min s ms mph Hz MHz GHz kW MW mV mA GB MB KB TB mol rpm hp ha atm Pa °C °F"
)
_SYMBOLS = {unit: unit for unit in _KNOWN.split()}
_SYMBOLS |= {"KM": "km", "Km": "km", "kms": "km", "KG": "kg", "Kg": "kg", "kgs": "kg", "cms": "cm"}
_SYMBOLS |= {"lbs": "lb", "mL": "ml", "hr": "h", "hrs": "h", "mins": "min", "sec": "s", "secs": "s", "kB": "KB"}
#: Units that wetext lacks or takes for others.
_NAMES = {
    **{
        "m": "meter",
        "Ω": "ohm",
        "l": "liter",
        "L": "liter",
        "W": "watt",
        "V": "volt",
        "N": "newton",
        "J": "joule",
        "Wh": "watt hour",
    },
    **{"μm": "micrometer", "μg": "microgram", "kWh": "kilowatt hour", "kHz": "kilohertz", "kPa": "kilopascal"},
    **{"kJ": "kilojoule", "kcal": "kilocalorie", "kV": "kilovolt", "dB": "decibel", "gal": "gallon", "dm": "decimeter"},
}
_POWERS_AFTER = {"square": "squared", "cubic": "cubed"}  # "meters per second squared"
_SAME_IN_PLURAL = {"kHz"}
_SIMPLE_UNIT = "|".join(sorted(map(re.escape, _SYMBOLS | _NAMES), key=len, reverse=True))
UNIT = rf"(?:(?:{_SIMPLE_UNIT})(?:\^\(?[23]\)?|[23])?(?:/(?:{_SIMPLE_UNIT})(?:\^\(?[23]\)?)?)?)(?![\w°]|/[A-Za-z]\b)"
_UNIT_PARTS = re.compile(rf"({_SIMPLE_UNIT})(?:\^?\(?([23])\)?)?")


def date_words(year: str, month: int, day: int) -> str:
    """Spell a date: "the first of May twenty twenty four".

    Raises:
        UnspeakableError: there is no such day.
    """
    try:
        date = datetime.date(int(year), month, day)
    except ValueError:
        raise UnspeakableError(f"it contains {year}-{month:02}-{day:02}, which is no date") from None
    name = MONTHS[month - 1]
    return _normalize(date.isoformat()).replace(f" of {name} ", f" of {name.capitalize()} ")


def month_number(name: str) -> int:
    """Return 1 to 12 for a month's name or its first three letters."""
    return next(number for number, month in enumerate(MONTHS, 1) if month.startswith(name[:3].lower()))


def year_words(year: str) -> str:
    """Spell a year: "nineteen ninety nine"."""
    return _normalize(year)


def decade_words(decade: str) -> str:
    """Spell "1980" or "80" of the eighties: "nineteen eighties"."""
    front, _, last = (_normalize(decade) if len(decade) == 4 else ordinal_words(decade)).rpartition(" ")
    if len(decade) == 2:
        return _normalize(f"{decade}s").removeprefix("the ")
    return f"{front} {last[:-1]}ies" if last.endswith("y") else f"{front} {last}s"


def time_words(hour: str, minute: str | None, suffix: str | None) -> str:
    """Spell a clock time: "nine fifteen AM", "eight o'clock".

    Raises:
        UnspeakableError: there is no such time.
    """
    half = (suffix or "").replace(".", "").replace(" ", "").lower()
    if int(hour) > (12 if half else 24) or int(minute or "0") > 59 or (half and int(hour) == 0):
        raise UnspeakableError(f"it contains {hour}:{minute or '00'}{half and ' '}{half}, which is no time")
    if half and minute in {None, "00"}:
        return _normalize(f"{int(hour)} {half}")
    return _normalize(f"{int(hour)}:{minute}{half and ' '}{half}")


def telephone_words(number: str) -> str:
    """Spell a telephone number digit by digit."""
    return _normalize(number)


def unit_words(unit: str, *, many: bool) -> str:
    """Spell a unit: "kilometers per hour" for "km/h"."""
    above, _, below = unit.partition("/")
    words = _powered_unit(above, many=many)
    if not below:
        return words
    per = re.sub(r"^(square|cubic) (.*)$", lambda m: f"{m[2]} {_POWERS_AFTER[m[1]]}", _powered_unit(below, many=False))
    return f"{words} per {per}"


def title_words(title: str) -> str:
    """Spell the title before a name: "doctor"."""
    return _normalize(f"{title} Lee").removesuffix(" Lee").capitalize()


def _powered_unit(unit: str, *, many: bool) -> str:
    match = _UNIT_PARTS.fullmatch(unit)
    assert match is not None
    symbol, power = match.groups()
    if symbol in _NAMES:
        words = _NAMES[symbol] + ("s" if many and symbol not in _SAME_IN_PLURAL else "")
    else:
        words = _normalize(f"{2 if many else 1} {_SYMBOLS[symbol]}").removeprefix("two " if many else "one ")
    return {None: "", "2": "square ", "3": "cubic "}[power] + words


@functools.lru_cache(maxsize=10_000)
def _normalize(expression: str) -> str:
    """Return what wetext speaks for one expression.

    Raises:
        UnspeakableError: it cannot read the expression.
        CordError: it is not installed.
    """
    try:
        words: str = _normalizer().normalize(expression)
    except (AssertionError, RuntimeError, ValueError):  # its grammar has no path
        words = ""
    if not re.search(r"[a-z]", words) or re.search(r"[^A-Za-z' ,.]", words):
        raise UnspeakableError(f"it contains {expression!r}, which the normaliser cannot read")
    return re.sub(r"\bhundred and ", "hundred ", words)


@functools.cache
def _normalizer() -> Any:
    try:
        from wetext import Normalizer
    except ImportError:
        raise CordError(
            "dates, times and units are spoken by wetext, which is missing; pip install megatron_cord[speech]"
        ) from None
    return Normalizer(lang="en", operator="tn")
