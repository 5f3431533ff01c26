"""Times of day and dates in their usual spellings: "9:15 p.m.", "half past nine", "July 4th, 1776", "2020-12-25".

Simplifications: English; a time without "am" or "pm" is on the 24-hour clock; 4/7/2020 has its month first and
4.7.2020 its day, unless that is no date.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import date

from text_to_num import alpha2digit

from megatron_cord.reward.wording.notation import normalized
from megatron_cord.reward.wording.words import whole_number

_LONGEST = 80  # characters of a time or a date
_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
MONTH = rf"(?:{'|'.join(rf'{name[:3]}(?:{name[3:]})?' if name[3:] else name for name in _MONTHS)}|sept)\b\.?"
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WEEKDAY = r"(?:(?P<weekday>mon|tue|wed|thu|fri|sat|sun)(?:s|nes|rs|ur)?(?:day)?\.?,?\s+(?:the\s+)?)?"
_DAY, _YEAR = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?", r"(?P<year>[0-9]{4}|[0-9]{2}\s[0-9]{2})"
_WRITTEN_DATES = [
    re.compile(rf"{_WEEKDAY}{pattern}")
    for pattern in (
        rf"(?P<month>{MONTH})\s*(?:the\s+)?{_DAY}(?:,?\s+{_YEAR})?",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+)?(?P<month>{MONTH})(?:,?\s+(?:of\s+)?{_YEAR})?",
        rf"(?P<month>{MONTH}),?\s+(?:of\s+)?{_YEAR}",
        rf"{_DAY}-(?P<month>{MONTH})-{_YEAR}",
    )
]
_YEAR_FIRST = re.compile(r"([0-9]{4})([-/.])([0-9]{1,2})\2([0-9]{1,2})")
_YEAR_LAST = re.compile(r"([0-9]{1,2})([-/.])([0-9]{1,2})\2([0-9]{4})")

_CAPITAL_MONTH = rf"(?-i:{'|'.join(rf'{name[:3].title()}(?:{name[3:]})?' for name in _MONTHS)}|Sept)\b\.?"
#: Matches dates and times in a text; months begin with a capital there, as "may" and "march" are words.
MOMENT_IN_TEXT = (
    rf"\b{_CAPITAL_MONTH}\s+[0-9]{{1,2}}(?:st|nd|rd|th)?(?:,?\s+[0-9]{{4}})?(?![:.,]?[0-9a-zA-Z])"
    rf"|(?<![\w.,])[0-9]{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?{_CAPITAL_MONTH}(?:,?\s+[0-9]{{4}})?"
    r"|(?<![\w.,])(?:[0-9]{4}(?P<s>[-/.])[0-9]{1,2}(?P=s)[0-9]{1,2}|[0-9]{1,2}(?P<t>[-/.])[0-9]{1,2}(?P=t)[0-9]{4}"
    r"|[0-9]{1,3}(?::[0-9]{1,3})+(?:\s?[aApP]\.?[mM]\b\.?)?|[0-9]{1,2}\s?[aApP]\.?[mM]\b\.?)(?![0-9])"
)

_HALF_DAY = (
    r"(?P<half>\s*a\.?\s?m\.?(?![a-z])|\s*p\.?\s?m\.?(?![a-z])"
    r"|\s+in the (?:morning|afternoon|evening)|\s+at night)?"
)
_CLOCK = re.compile(
    rf"(?P<hour>[0-9]{{1,2}})(?::(?P<minute>[0-9]{{2}})(?::(?P<second>[0-9]{{2}}))?)?(?P<oclock>\s*o'?clock)?{_HALF_DAY}"
)
_PAST = re.compile(
    rf"(?P<part>[a-z0-9 -]+?)(?:\s+minutes?)?\s+(?P<side>past|after|to|before)\s+(?P<hour>[a-z0-9]+){_HALF_DAY}"
)
_SPOKEN = re.compile(rf"(?P<words>[a-z]+(?:[ -][a-z]+){{0,3}}?)(?P<oclock>\s+o'?clock)?{_HALF_DAY}")
_NAMED = {
    "noon": 12,
    "midday": 12,
    "twelve noon": 12,
    "12 noon": 12,
    "midnight": 0,
    "twelve midnight": 0,
    "12 midnight": 0,
}
_PARTS = {"half": 30, "quarter": 15, "a quarter": 15}


@dataclass(frozen=True)
class TimeOfDay:
    """Seconds since midnight."""

    seconds: int


@dataclass(frozen=True)
class CalendarDate:
    """A day, or a month of a year; None for what is not given."""

    year: int | None
    month: int
    day: int | None


def parse_time(text: str) -> TimeOfDay | None:
    """Return the text as a time of day; None for anything else, a bare number included."""
    text = re.sub(r"^(?:at|by) ", "", normalized(text).lower()) if len(text) <= _LONGEST else ""
    if text in _NAMED:
        return TimeOfDay(3600 * _NAMED[text])
    if match := _CLOCK.fullmatch(text):
        if not (match["minute"] or match["oclock"] or match["half"]):
            return None
        return _time(int(match["hour"]), int(match["minute"] or 0), int(match["second"] or 0), match["half"])
    if match := _PAST.fullmatch(text):
        minute = _PARTS.get(match["part"]) or _small(match["part"])
        hour = _small(match["hour"])
        if minute is None or hour is None or hour > 12 or not 0 < minute < 60:
            return None
        if match["side"] in {"to", "before"}:
            if not (match["part"] in _PARTS or "minute" in text or match["half"]):
                return None  # "three to five" is a range
            hour, minute = hour - 1, 60 - minute
        return _time(hour % 24, minute, 0, match["half"])
    return _spoken(text)


def _spoken(text: str) -> TimeOfDay | None:
    match = _SPOKEN.fullmatch(text)
    if match is None:
        return None
    words = match["words"].replace("-", " ").split()
    if hour := _small(" ".join(words)):
        return _time(hour, 0, 0, match["half"]) if match["oclock"] or match["half"] else None
    for place in range(1, len(words)):
        hour, minutes = _small(" ".join(words[:place])), words[place:]
        minute = _small(" ".join(minutes[1:] if minutes[0] in {"oh", "o", "zero"} else minutes))
        if hour is not None and minute is not None and (minute >= 10) != (minutes[0] in {"oh", "o", "zero"}):
            return _time(hour, minute, 0, match["half"])
    return None


def spoken_year(text: str) -> int | None:
    """Return 1945 for "nineteen forty five", which may be a time as well; None for anything else."""
    words = re.sub(r"^in ", "", normalized(text).lower()).replace("-", " ").split() if len(text) <= _LONGEST else []
    for place in range(1, min(len(words), 3)):
        century, rest = _small(" ".join(words[:place])), words[place:]
        short = rest[0] in {"oh", "o"}
        year = _small(" ".join(rest[short:]))
        if century is None or year is None:
            continue
        if 10 <= century <= 20 and (year < 10 if short else 10 <= year < 100):
            return 100 * century + year
    return None


def _small(words: str) -> int | None:
    return int(words) if words.isdigit() and len(words) < 3 else whole_number(words.split()) if words else None


def _time(hour: int, minute: int, second: int, half: str | None) -> TimeOfDay | None:
    if half:
        half = half.strip()
        morning = (half.startswith("a") and half != "at night") or half == "in the morning"
        if not morning and hour < 12 and not (half == "at night" and hour < 5):
            hour += 12
        elif hour == 12 and (morning or half == "at night"):
            hour = 0
        elif morning and hour > 12:
            return None
    return TimeOfDay(3600 * hour + 60 * minute + second) if hour < 24 and minute < 60 and second < 60 else None


def parse_date(text: str) -> CalendarDate | None:
    """Return the text as a date; None for anything else."""
    if len(text) > _LONGEST:
        return None
    text = re.sub(r"^(?:on|in) ", "", normalized(text).lower())
    if match := _YEAR_FIRST.fullmatch(text):
        return _date(int(match[1]), int(match[3]), int(match[4]))
    if match := _YEAR_LAST.fullmatch(text):
        first, second, year = int(match[1]), int(match[3]), int(match[4])
        orders = [(first, second), (second, first)]
        for month, number in orders[::-1] if match[2] == "." else orders:
            if found := _date(year, month, number):
                return found
        return None
    if not re.search(rf"\b{MONTH}", text):
        return None
    text = " ".join(str(alpha2digit(text, "en", threshold=0)).split())
    for pattern in _WRITTEN_DATES:
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            named = next(i for i, name in enumerate(_MONTHS, 1) if name.startswith(parts["month"][:3]))
            given = int(parts["year"].replace(" ", "")) if parts.get("year") else None
            return _date(given, named, int(parts["day"]) if parts.get("day") else None, parts.get("weekday"))
    return None


def _date(year: int | None, month: int, day: int | None, weekday: str | None = None) -> CalendarDate | None:
    with suppress(ValueError):
        checked = date(2000 if year is None else year, month, day or 1)
        if weekday is None or year is None or day is None or _WEEKDAYS[checked.weekday()] == weekday:
            return CalendarDate(year, month, day)
    return None
