"""Numbers in English words, read back: "minus two and three quarters", "zero point seven five", "seven thousand".

The package `text2num` reads whole numbers and ordinals; what it lacks is added here: signs, decimals, fractions,
dozens and trillions. Words that can be read as two numbers ("one hundred twenty fifths") are none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from text_to_num import alpha2digit, text2num

MOST_WORDS = 40  #: longer ones are no number
_LARGEST_POWER = 100
SCALES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"lakh": 10**5, "crore": 10**7, "dozen": 12, "dozens": 12},
}
_ARTICLES = {"a", "an"}
_SIGNS = {"minus", "negative"}
_HALVES = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_ORDINAL = re.compile(r"([0-9]+)(?:st|nd|rd|th)s?")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


@lru_cache(4096)
def is_number_word(word: str) -> bool:
    """Return whether a word counts or divides: "seven", "twenty-four", "thirds", "half", "dozen"."""
    parts = split_word(word.lower())
    return all(map(_counts, parts)) or (len(parts) > 1 and read_number(parts) is not None)


def _counts(word: str) -> bool:
    return word in SCALES or word in _HALVES or whole_number([word]) is not None or _denominator([word]) is not None


def read_number(words: Sequence[str]) -> Fraction | None:
    """Return the value of words that are a number, all of them; None for anything else.

    Args:
        words: in lower case; "twenty-four" is one.
    """
    words = [part for word in words for part in split_word(word)]
    if not words or len(words) > MOST_WORDS or not all(_WORD.fullmatch(word) for word in words):
        return None
    if words[0] in _SIGNS:
        value = _unsigned(words[1:])
        return None if value is None else -value
    return _unsigned(words)


def split_word(word: str) -> list[str]:
    """Return the parts of "two-thirds", but neither "twenty-four" nor "twenty-fifths"."""
    parts = word.split("-")
    return [word] if len(parts) == 2 and (whole_number(parts[:1]) or 0) in range(20, 100, 10) else parts


def ordinal_number(words: Sequence[str]) -> int | None:
    """Return 21 for "twenty first"; None for anything else, "twenty firsts" included."""
    return None if words and words[-1].endswith("s") else _ordinal(" ".join(words))


def whole_number(words: Sequence[str]) -> int | None:
    """Return the value of words that are a whole number: 105000 for "one hundred and five thousand"."""
    words = ["one" if w in _ARTICLES and i == 0 and len(words) > 1 else w for i, w in enumerate(words)]
    if "trillion" in words:
        place = words.index("trillion")
        above, below = whole_number(words[:place] or ["one"]), _rest(words[place + 1 :])
        return None if above is None or below is None or below >= 10**12 else above * 10**12 + below
    if len(words) > 1 and words[0] == "zero":
        return None  # digits one by one
    for larger, smaller in (("million", "thousand"), ("billion", "thousand"), ("billion", "million")):
        if larger in words and smaller in words and f"{larger} {smaller}" in " ".join(words):
            return None  # "one million thousand"
    try:
        return int(text2num(" ".join(words), "en"))
    except (ValueError, OverflowError):
        return None


def _rest(words: list[str]) -> int | None:
    words = words[1:] if words[:1] == ["and"] else words
    return whole_number(words) if words else 0


def _unsigned(words: list[str]) -> Fraction | None:
    if not words:
        return None
    if words[-1] in {"dozen", "dozens"}:
        return _times_dozen(words[:-1])
    if words[-1] in SCALES and {"point", "and", "half"} & set(words) and "over" not in words:
        factor = _unsigned(words[:-1])
        if factor is not None and factor.denominator != 1:
            return factor * SCALES[words[-1]]  # "two and a half million"
    if "power" in words:
        return _power_of_ten(words)
    if "point" in words:
        return _decimal(words)
    if "over" in words:
        place = words.index("over")
        above, below = whole_number(words[:place]), whole_number(words[place + 1 :])
        return Fraction(above, below) if above is not None and below else None
    if (whole := whole_number(words)) is not None:
        return Fraction(whole)
    return _mixed(words)


def _times_dozen(words: list[str]) -> Fraction | None:
    if words[-1:] == ["a"] and len(words) > 1:
        words = words[:-1]  # "half a dozen"
    count = Fraction(1) if words in (["a"], []) else _unsigned(words)
    return None if count is None else count * 12


def _power_of_ten(words: list[str]) -> Fraction | None:
    """Return the value of "one point five times ten to the power of minus six"."""
    match = re.fullmatch(r"(?:(.+) times )?ten to the power of (minus )?(.+)", " ".join(words))
    factor = _unsigned(match[1].split()) if match and match[1] else Fraction(1)
    exponent = whole_number(match[3].split()) if match else None
    if match is None or factor is None or exponent is None or exponent > _LARGEST_POWER:
        return None
    return factor * Fraction(10) ** (-exponent if match[2] else exponent)


def _decimal(words: list[str]) -> Fraction | None:
    place = words.index("point")
    whole = whole_number(words[:place]) if place else 0
    decimals = [0 if word == "oh" else whole_number([word]) for word in words[place + 1 :]]
    if whole is None or not decimals or any(digit is None or digit > 9 for digit in decimals):
        return None
    return Fraction(f"{whole}.{''.join(map(str, decimals))}")


def _mixed(words: list[str]) -> Fraction | None:
    found = set() if (fraction := _fraction(words)) is None else {fraction}
    for place, word in enumerate(words):
        if word == "and" and (whole := whole_number(words[:place])) is not None:
            part = _fraction(words[place + 1 :])
            if part is not None and part < 1:
                found.add(whole + part)
    return found.pop() if len(found) == 1 else None


def _fraction(words: list[str]) -> Fraction | None:
    if words in (["half"], ["a", "half"]):
        return Fraction(1, 2)
    found = set()
    for place in range(1, len(words)):
        front = words[:place]
        if "and" in front and front[front.index("and") - 1] not in SCALES:
            continue  # "twenty and two thirds" is a mixed number, not "twenty two" thirds
        above = 1 if front == ["a"] else whole_number(front)
        below = _denominator(words[place:])
        if above is not None and below is not None and (above == 1) != words[-1].endswith("s"):
            found.add(Fraction(above, below))
    return found.pop() if len(found) == 1 else None


def _denominator(words: Sequence[str]) -> int | None:
    """Return 4 for "quarters" or "fourths", 25 for "twenty fifths"; larger ones have one word, or "one" before it."""
    if len(words) == 1 and words[0] in _HALVES:
        return _HALVES[words[0]]
    if len(words) > 2 or (words[-1] in {"first", "second", "seconds"} and len(words) == 1):
        return None  # never parts, but places and moments
    below = _ordinal(" ".join(words))
    return below if below and (len(words) == 1 or below < 100 or words[0] == "one") else None


@lru_cache(4096)
def _ordinal(words: str) -> int | None:
    # "sixtieth" alone is unknown to text2num.
    match = _ORDINAL.fullmatch(str(alpha2digit(words.replace("sixtieth", "seventieth"), "en", threshold=0)))
    return int(match[1]) - 10 * ("sixtieth" in words) if match else None
