"""Dates, years, decades, clock times, and what else has a colon between numbers."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.hyphens import in_mathematics
from megatron_cord.speech.verbalization.normaliser import (
    MONTH,
    MONTHS,
    UNIT,
    date_words,
    decade_words,
    month_number,
    time_words,
    year_words,
)
from megatron_cord.speech.verbalization.numbers import number_words, ordinal_words
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule

_APART = r"(?<![\w.,])"  # before a number that nothing touches
_TIME = r"([0-9]{1,2})(?::([0-9]{2}))?(?!:?[0-9])(?:\s?([ap]\.m\b\.?|[ap]m\b|[AP]\.M\b\.?|[AP]M\b))?"
_TIME_BEFORE = re.compile(
    r"\b(?:at|by|until|till|since|before|after|around|about|from|to|between|and|time(?: is| was)?|now|clock"
    r"|it(?: is|'s)|past|opens?|closes?|starts?|begins?|ends?|leaves?|arrives?|departs?)\s*$",
    re.IGNORECASE,
)
_RATIO_NEAR = re.compile(r"\b(?:ratio|proportion|scale|odds|mix(?:ed|ture)?)\b", re.IGNORECASE)
_SCORE_NEAR = re.compile(r"\b(?:score\w*|won|lost|beat|drew|defeated)\b", re.IGNORECASE)
_YEAR_BEFORE = re.compile(
    rf"(?:\b(?:in|since|during|year|summer|winter|spring|autumn|fall|born|circa)(?: of)?"
    rf"|(?:{MONTH}),?)\s+$",
    re.IGNORECASE,
)
_THING_AFTER = re.compile(
    rf"\s*[-+*/×÷^=<>%°$€£(]|\s?{UNIT}|\s+(?:people|men|women|children|(?!was\b|has\b|this\b|its\b|does\b)[a-z]{{3,}}s)\b"
)
_YEAR_DIGITS = r"(?P<year>[0-9]{4})(?![\w-])"
_DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"


def _iso_date(place: Place) -> str:
    year, month, day = place.match.groups()
    if in_mathematics(place.text, place.match.start()):
        raise UnspeakableError(f"it contains {place.match[0]!r}, which may be a date or a sum")
    return f" {date_words(year, int(month), int(day))} "


def _slashed_date(place: Place) -> str:
    first, second, year = place.match.groups()
    low, high = sorted((int(first), int(second)))
    if high <= 12 and low != high:
        raise UnspeakableError(f"it contains {place.match[0]!r}, a date of which day and month are not sure")
    return f" {date_words(year, low, high)} "


def _short_date(place: Place) -> str | None:
    if place.in_formula or in_mathematics(place.text, place.match.start()):
        return None
    raise UnspeakableError(f"it contains {place.match[0]!r}, which may be a date or a fraction")


def _named_date(place: Place) -> str:
    parts = place.match.groupdict()
    return f" {date_words(parts['year'], month_number(parts['month']), int(parts['day']))} "


def _day_of_month(place: Place) -> str | None:
    month, day = place.match.groups()
    follows_word = re.match(r"\s+[a-z]{3,}", place.after) and month.lower() in {"may", "march"}
    if follows_word or not 1 <= int(day) <= 31 or re.match(r"\s?[-:/]\s?[0-9]|,[0-9]|\s?[%°]", place.after):
        return None
    name = MONTHS[month_number(month) - 1].capitalize()
    return f" {name} {ordinal_words(day)} "


def _day_before_month(place: Place) -> str | None:
    day, month = place.match.groups()
    if month.lower() in {"may", "march"} or not 1 <= int(day) <= 31:
        return None
    return f" the {ordinal_words(day)} of {MONTHS[month_number(month) - 1].capitalize()} "


def _time(place: Place) -> str | None:
    hour, minute, suffix = place.match.groups()
    if suffix is None:
        near = place.before[-40:] + place.after[:40]
        is_sure = minute is not None and (minute[0] == "0" or hour[0] == "0" or _TIME_BEFORE.search(place.before))
        if not is_sure or int(hour) > 24 or _RATIO_NEAR.search(near) or _SCORE_NEAR.search(near):
            return None
    ends = "." if (suffix or "").endswith(".") and not place.after.strip() else ""
    return f" {time_words(hour, minute, suffix)}{ends} "


def _time_range(place: Place) -> str | None:
    groups = place.match.groups()
    first, second = groups[:3], groups[3:]
    near = place.before[-40:] + place.after[:40]
    if not (first[2] or second[2] or (first[1] and second[1])) or _SCORE_NEAR.search(near):
        return None
    word = "and" if place.before.rstrip().lower().endswith("between") else "to"
    return f" {_time_or_hour(*first)} {word} {_time_or_hour(*second)} "


def _time_or_hour(hour: str, minute: str | None, suffix: str | None) -> str:
    return number_words(hour) if minute is None and suffix is None else time_words(hour, minute, suffix)


def _colon(place: Place) -> str:
    near = place.before[-60:] + place.after[:60]
    if _RATIO_NEAR.search(near) or _SCORE_NEAR.search(near):
        return " " + " to ".join(number_words(number) for number in re.split(r"\s?:\s?", place.match[0])) + " "
    raise UnspeakableError(f"it contains {place.match[0]!r}, which may be a time, a ratio or a score")


def _year(place: Place) -> str | None:
    year, after = place.match[0], place.after
    if not 1010 <= int(year) <= 2099 or place.in_formula or in_mathematics(place.text, place.match.start()):
        return None
    begins_range = re.match(r"\s?-\s?[0-9]{4}(?![\w,]|\.[0-9])", after)
    ends_range = re.search(r"(?<![\w.,-])[0-9]{4}\s?-\s?$", place.before)
    if begins_range:
        after = after[begins_range.end() :]
    if _THING_AFTER.match(after) or not (begins_range or ends_range or _YEAR_BEFORE.search(place.before)):
        return None
    return f" {year_words(year)} "


def _decade(place: Place) -> str:
    return f" {decade_words(place.match[1])} "


DATES_AND_TIMES: tuple[Rule, ...] = (
    rule(r"(?<![\w.,/-])([0-9]{4})[-/]([0-9]{1,2})[-/]([0-9]{1,2})(?![\w/-]|[.,][0-9])", _iso_date),
    rule(r"(?<![\w.,/-])([0-9]{1,2})/([0-9]{1,2})/([0-9]{4})(?![\w/-])", _slashed_date),
    rule(r"(?<![\w.,/-])(?:0?[1-9]|1[0-2])/(?:19|20)[0-9]{2}(?![\w/-])", _short_date),
    rule(r"(?:(?<=\b[Oo]n )|(?<=\b[Dd]ue )|(?<=\bsince ))[0-9]{1,2}/[0-9]{1,2}(?![\w/-])", _short_date),
    rule(r"(?<![\w.,/-])0[0-9]+/[0-9]+(?![\w/-])", _short_date),
    rule(rf"(?<!\w)(?P<month>{MONTH})\s+{_DAY},?\s+{_YEAR_DIGITS}", _named_date),
    rule(rf"{_APART}(?:the\s+)?{_DAY}\s+(?:of\s+)?(?P<month>{MONTH}),?\s+{_YEAR_DIGITS}", _named_date),
    rule(rf"(?<!\w)({MONTH})\s+([0-9]{{1,2}})(?![\w]|\.[0-9])", _day_of_month),
    rule(rf"{_APART}([0-9]{{1,2}})\s+({MONTH})(?!\w|,?\s+[0-9])", _day_before_month),
    rule(rf"{_APART}{_TIME}\s?-\s?{_TIME}(?!\w)", _time_range),
    rule(rf"{_APART}{_TIME}(?![\w])", _time),
    rule(r"(?<![\w.:])[0-9]+(?:\.[0-9]+)?(?:\s?:\s?[0-9]+(?:\.[0-9]+)?)+", _colon),
    rule(r"(?<![\w.,])(?:'(?=[0-9]{2}s))?([0-9]{2}|1[0-9]{2}0|20[0-9]0)'?s(?!\w)", _decade),
    rule(r"(?<![\w.,:])[0-9]{4}(?![\w:]|[.,][0-9])", _year),
)
