"""Numbers in English words: how they are read aloud, and the tables by which they are read back.

Thirty lines of our own, since the packages for it take seconds to import in every worker process.
"""

from __future__ import annotations

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS_NAMES = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}

UNITS = {word: value for value, word in enumerate(_SMALL)}  #: "zero" to "nineteen"
TENS = {word: 10 * value for value, word in enumerate(_TENS_NAMES, start=2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def cardinal(number: int) -> str:
    """Spell a number: "one hundred five thousand twenty" for 105020.

    Raises:
        ValueError: negative, or a thousand trillions and more.
    """
    if not 0 <= number < 10**15:
        raise ValueError(f"no words for {number}")
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return f"{_TENS_NAMES[number // 10 - 2]}{_rest(number % 10)}"
    if number < 1000:
        return f"{_SMALL[number // 100]} hundred{_rest(number % 100)}"
    name, scale = max(((n, s) for n, s in SCALES.items() if s <= number), key=lambda pair: pair[1])
    return f"{cardinal(number // scale)} {name}{_rest(number % scale)}"


def ordinal(number: int) -> str:
    """Spell an ordinal: "twenty first" for 21. Raises ValueError like ``cardinal``."""
    front, _, last = cardinal(number).rpartition(" ")
    if last in _IRREGULAR_ORDINALS:
        last = _IRREGULAR_ORDINALS[last]
    else:
        last = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return f"{front} {last}".strip()


def _rest(number: int) -> str:
    return f" {cardinal(number)}" if number else ""
