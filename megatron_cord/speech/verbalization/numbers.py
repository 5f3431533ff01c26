"""Numbers, fractions and sums of money in words. Every digit that is written is spoken: "0.50" keeps its zero."""

from __future__ import annotations

import re

from megatron_cord.data.number_words import cardinal, ordinal
from megatron_cord.speech.verbalization.errors import UnspeakableError

NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
FRACTION = r"[0-9]{1,4}\s?/\s?[0-9]{1,4}(?![0-9/]|[.,][0-9])"
SCALE = r"thousand|million|billion|trillion|mil|bn|mn|tn|[kKmMbBT](?![\w'])"
CURRENCY = r"(?:US|(?<![A-Za-z]))[$]|[€£¥₹]"

_SCALES = {
    "k": "thousand",
    "m": "million",
    "mn": "million",
    "mil": "million",
    "b": "billion",
    "bn": "billion",
    "t": "trillion",
}
_SCALES |= {"tn": "trillion"}
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "US$": ("U S dollar", "U S dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
    "₹": ("rupee", "rupees", "paisa", "paise"),
}
_LONGEST_NUMBER = 15  # digits; longer ones are read digit by digit
_LARGEST_NAMED_DENOMINATOR = 20  # above it "three thirty seconds" and "twenty one hundredths" may be heard wrongly


def number_words(digits: str) -> str:
    """Spell a number as NUMBER matches it; one with leading zeros digit by digit, as a code."""
    whole, _, decimals = digits.replace(",", "").partition(".")
    is_code = len(whole) > 1 and whole.startswith("0")
    words = _digit_by_digit(whole) if is_code or len(whole) > _LONGEST_NUMBER else cardinal(int(whole or "0"))
    return f"{words} point {_digit_by_digit(decimals)}" if decimals else words


def ordinal_words(digits: str) -> str:
    """Spell "21" as "twenty first"."""
    return ordinal(int(digits))


def fraction_words(above: str, below: str) -> str:
    """Spell a fraction: "three quarters", or "twenty one over one hundred" where the name could be misheard."""
    top, bottom = int(above), int(below)
    if not is_named(above, below):
        return f"{number_words(above)} over {number_words(below)}"
    name = {2: "half", 4: "quarter"}.get(bottom) or ordinal(bottom)
    return f"{cardinal(top)} {name if top == 1 else 'halves' if bottom == 2 else f'{name}s'}"


def is_named(above: str, below: str) -> bool:
    """Tell whether a fraction has a name of its own ("three quarters"), so that it is heard as one value."""
    return 0 < int(above) < int(below) <= _LARGEST_NAMED_DENOMINATOR


def amount_words(number: str) -> str:
    """Spell a number, a fraction or a mixed number."""
    if mixed := re.fullmatch(r"(?:([0-9]+)\s+)?([0-9]+)\s?/\s?([0-9]+)", number):
        whole, above, below = mixed.groups()
        if whole and not is_named(above, below):
            raise UnspeakableError(f"it contains {number!r}, which is no mixed number")
        return f"{number_words(whole)} and {fraction_words(above, below)}" if whole else fraction_words(above, below)
    return number_words(number)


def scaled_words(number: str, scale: str) -> str:
    """Spell "1.2" and "M" as "one point two million"."""
    return f"{number_words(number)} {_SCALES.get(scale.lower(), scale.lower())}"


def money_words(sign: str, number: str, scale: str | None = None) -> str:
    """Spell a sum of money: "five dollars and fifty cents", "one point two million dollars"."""
    one, many, part, parts = _CURRENCIES[sign]
    if scale:
        return f"{scaled_words(number, scale)} {many}"
    whole, _, decimals = number.replace(",", "").partition(".")
    if len(decimals) != 2 or not part or len(whole) > _LONGEST_NUMBER:
        return f"{number_words(number)} {one if number == '1' else many}"
    if decimals == "00":
        return f"{number_words(whole)} {one if whole == '1' else many}"
    cents = f"{cardinal(int(decimals))} {part if decimals == '01' else parts}"
    return cents if whole in {"", "0"} else f"{number_words(whole)} {one if whole == '1' else many} and {cents}"


def _digit_by_digit(digits: str) -> str:
    return " ".join(cardinal(int(digit)) for digit in digits)
