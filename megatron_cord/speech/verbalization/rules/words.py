"""Abbreviations, titles, Roman numerals, Greek letters, names of functions, and signs that stand for a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.normaliser import title_words
from megatron_cord.speech.verbalization.numbers import number_words
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule

_ROMAN = r"(?=[IVX])(?:X{0,3})(?:IX|IV|V?I{0,3})"
_ROMAN_AFTER = (
    "Chapter|Part|Volume|Book|Section|Act|Scene|War|Phase|Type|Class|Level|Grade|Article|Appendix|Figure|Table"
    "|Question|Problem|Unit|Step|Round|Stage|Division|Group|Title|Amendment|chapter|part|volume|book|section|act|scene"
    "|phase|type|class|level|grade|article|appendix|figure|table|question|problem|unit|step|round|stage|group"
)
_ROMAN_DIGITS = {"I": 1, "V": 5, "X": 10}
_BEFORE_NUMBER = {
    "no": "number", "nos": "numbers", "fig": "figure", "figs": "figures", "eq": "equation", "p": "page", "pp": "pages",
    "ch": "chapter", "sec": "section", "vol": "volume", "art": "article", "approx": "approximately", "ca": "circa",
}  # fmt: skip
_ABBREVIATIONS = {"vs": "versus", "e.g": "for example", "i.e": "that is"}
_KNOWN_IN_FORMULAS = "and so on to log the set in of pi mod th sin cos tan max min gcd lcm if or is for"
_WORDS_IN_FORMULAS = set(_KNOWN_IN_FORMULAS.split())


def _number_of(place: Place) -> str:
    word = place.match[1].lower().rstrip(".")
    if word == "no" and place.left in {"?", "!"}:
        raise UnspeakableError("it contains 'No.' before a number, which may be an answer or 'number'")
    return f"{_BEFORE_NUMBER[word].capitalize() if place.match[1][0].isupper() else _BEFORE_NUMBER[word]} "


def _roman(place: Place) -> str | None:
    numeral = place.match[0]
    if after := re.search(rf"\b({_ROMAN_AFTER})\s+$", place.before):
        if numeral == "I" and after[1].islower():
            return None
        values = [_ROMAN_DIGITS[letter] for letter in numeral]
        pairs = zip(values, [*values[1:], 0], strict=True)
        return f"{number_words(str(sum(-value if value < following else value for value, following in pairs)))}"
    if len(numeral) == 1:
        return None
    raise UnspeakableError(f"it contains {numeral!r}, which may be a Roman numeral")


def _long_roman(place: Place) -> str:
    raise UnspeakableError(f"it contains {place.match[0]!r}, which may be a Roman numeral")


def _title(place: Place) -> str:
    return title_words(place.match[0].strip())


def _abbreviation(place: Place) -> str:
    return _ABBREVIATIONS[place.match[1].lower()]


def _hash(place: Place) -> str:
    if not re.match(r"\s?[0-9]", place.after) or re.search(r"\w$", place.before):
        raise UnspeakableError("it contains '#' without a number")
    return " number "


def _between_words(word: str) -> Callable[[Place], str]:
    def speak(place: Place) -> str:
        if not place.left or not place.right:
            raise UnspeakableError(f"it contains {place.match[0].strip()!r}")
        return f" {word} "

    return speak


def _about(place: Place) -> str:
    if not re.match(r"\s?[0-9$]", place.after):
        raise UnspeakableError("it contains '~' without a number")
    return " about "


def _square_root(place: Place) -> str:
    return " times the square root of " if re.search(r"[\w)]$", place.before) else " the square root of "


def _dots(place: Place) -> str:
    if re.search(r"[0-9]\s?$", place.before) and re.match(r"\s?[0-9]", place.after):
        raise UnspeakableError("it contains dots between numbers")
    return ". "


def _letters(place: Place) -> str | None:
    is_product = place.in_formula and not place.touching[0].isalpha() and place.match[0] not in _WORDS_IN_FORMULAS
    return " ".join(place.match[0]) if is_product else None


def _greek(place: Place) -> str | None:
    words = unicodedata.name(place.match[0], "").split()
    return f" {words[3].lower()} " if len(words) == 4 and words[2] == "LETTER" else None


WORDS: tuple[Rule, ...] = (
    rule(r"(?<![\w.])(nos?|figs?|eq|pp?|ch|sec|vol|art|approx|ca)\.\s*(?=[0-9])", _number_of, re.IGNORECASE),
    rule(rf"(?<![\w']){_ROMAN}(?![\w'])", _roman),
    rule(r"(?<!\w)(?=[MDCLXVI]{4})M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})(?!\w)", _long_roman),
    rule(r"(?<!\w)(?:Dr|Gen|Sgt|Capt|Mt)\.(?=\s+[A-Z])", _title),
    rule(r"(?<![\w.])(vs|e\.g|i\.e)\.", _abbreviation, re.IGNORECASE),
    rule(r"#\s?", _hash),
    rule(r"\s*&\s*", _between_words("and")),
    rule(r"\s+@\s+", _between_words("at")),
    rule(r"~\s?", _about),
    rule(r"√|(?<!\w)sqrt(?=\()", _square_root),
    rule(r"(?<!\w)sin(?=\(|\s[0-9xyztαβθ])", lambda place: " sine "),
    rule(r"(?<!\w)cos(?=\(|\s[0-9xyztαβθ])", lambda place: " cosine "),
    rule(r"(?<!\w)tan(?=\(|\s[0-9xyztαβθ])", lambda place: " tangent "),
    rule(r"∞", lambda place: " infinity "),
    rule(r"\.{2,}", _dots),
    rule(r"[A-Za-z]{2,3}(?![A-Za-z])", _letters),
    rule(r"(?<![Α-ω])[Α-Ωα-ω](?![Α-ω])", _greek),
)
