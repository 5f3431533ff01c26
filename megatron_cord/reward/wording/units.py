"""Units behind a number: which words leave its value as it is, and which units measure the same.

Any words may be a unit ("5 red apples"), except those that change the value: other numbers, scales, "or", variables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_cord.reward.wording.words import is_number_word

_MOST_WORDS = 6
#: For each quantity its units: names, and how many of the first one each is.
_MEASURES: dict[str, list[tuple[str, Fraction | int]]] = {
    "dollar": [("$ dollar dollars usd buck bucks", 1), ("¢ cent cents", Fraction(1, 100))],
    "euro": [("€ euro euros eur", 1)],
    # A pound is money or a weight; the question tells which.
    "pound": [
        ("£ pound pounds lb lbs gbp quid", 1),
        ("pence penny", Fraction(1, 100)),
        ("oz ounce ounces", Fraction(1, 16)),
    ],
    "yen": [("¥ yen jpy", 1)],
    "rupee": [("₹ rupee rupees inr", 1)],
    "second": [
        ("s sec secs second seconds", 1),
        ("min mins minute minutes", 60),
        ("h hr hrs hour hours", 3600),
        ("day days", 86400),
        ("week weeks", 604800),
    ],
    "month": [("month months", 1), ("yr yrs year years", 12)],
    "meter": [
        ("m meter meters metre metres", 1),
        ("km kilometer kilometers kilometre kilometres", 1000),
        ("cm centimeter centimeters centimetre centimetres", Fraction(1, 100)),
        ("mm millimeter millimeters millimetre millimetres", Fraction(1, 1000)),
    ],
    "inch": [("inch inches", 1), ("ft foot feet", 12), ("yd yard yards", 36), ("mi mile miles", 63360)],
    "gram": [
        ("g gram grams", 1),
        ("kg kgs kilogram kilograms", 1000),
        ("mg milligram milligrams", Fraction(1, 1000)),
    ],
    "liter": [
        ("l liter liters litre litres", 1),
        ("ml milliliter milliliters millilitre millilitres", Fraction(1, 1000)),
    ],
}
_UNITS = {
    name: (names.split()[1 if names[0] in "$¢€£¥₹" else 0], measure, Fraction(factor))
    for measure, units in _MEASURES.items()
    for names, factor in units
    for name in names.split()
}
CURRENCIES = "$€£¥₹¢"
_OTHER_SHORT = {"°", "°c", "°f", "mph", "kph", "gb", "mb", "kb", "tb", "hz", "kw", "w", "v", "n", "j"}
_CHANGE_THE_VALUE = {
    *(
        "or",
        "and",
        "to",
        "than",
        "less",
        "fewer",
        "over",
        "under",
        "plus",
        "minus",
        "negative",
        "divided",
        "not",
        "but",
    ),
    *("squared", "cubed", "percent", "point", "if", "but", "until", "between", "twice", "double", "triple", "am", "pm"),
    *("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "square", "root", "times", "ratio", "odds"),
    *("o'clock", "because", "is", "are", "equals", "versus", "vs", "through", "score", "gross", "factorial"),
}
_RATES = {"a", "an", "each", "every", "per", "/"}
_IRREGULAR = {
    "children": "child",
    "people": "person",
    "men": "man",
    "women": "woman",
    "geese": "goose",
    "mice": "mouse",
}
_POWER = re.compile(r"([a-z]+)\s?\^\s?\{?([23])\}?")


@dataclass(frozen=True)
class Unit:
    """What is counted, in the singular, and by what it is divided ("per hour"); "" for a bare number."""

    name: str = ""
    rate: str = ""

    def factor_to(self, other: Unit) -> Fraction | None:
        """Return how many of the other unit one of this is; None for units that measure different things."""
        if self.rate and other.rate and self.rate != other.rate:
            return None
        if self.name == other.name:
            return Fraction(1)
        mine, others = _UNITS.get(self.name), _UNITS.get(other.name)
        if mine and others and mine[1] == others[1]:
            return mine[2] / others[2]
        return None


NO_UNIT, PERCENT, PLACE = Unit(), Unit("%"), Unit("th")


def is_measured(word: str) -> bool:
    """Return whether a word names a unit of a measure ("hours", "cents"), in which amounts have parts."""
    return len(word) > 1 and word in _UNITS


def read_unit(text: str, *, attached: bool = False) -> Unit | None:
    """Return the unit that all of the text is, or None.

    Args:
        text: in lower case, what follows a number.
        attached: nothing stands between the number and it: "5km", but "3y" is an expression.
    """
    text = text.strip(" .")
    if not text:
        return NO_UNIT
    if text in {"%", "percent", "per cent", "pct"}:
        return PERCENT
    if text in {"in", "degree", "degrees"}:
        return Unit("inch" if text == "in" else "°")
    text = re.sub(r"\b(?:square|sq\.?) ([a-z]+)", lambda m: f"{_singular(m[1])}^2", text)
    text = re.sub(r"\bcubic ([a-z]+)", lambda m: f"{_singular(m[1])}^3", text)
    text = re.sub(r"^(?:°|degrees?) ?(?:celsius|c)\b", "°c", text)
    text = re.sub(r"^(?:°|degrees?) ?(?:fahrenheit|f)\b", "°f", text)
    text = _POWER.sub(lambda m: f"{_singular(m[1])}^{m[2]}", text)
    words = re.sub(r"(?<=[a-z])\s?/\s?(?=[a-z])", " / ", text).split()
    if len(words) > _MOST_WORDS or not all(map(_leaves_the_value, words)):
        return None
    if attached and (not _known(words[0]) or (len(words[0]) == 1 and words[0] not in "mgshl°")):
        return None  # a variable, unless it is the usual sign of a measure
    if len(words[0]) == 1 and not _known(words[0]):
        return None
    if len(words) > 1 and words[-1] in _UNITS and words[0] in {"us", "u.s"}:
        words = words[1:]
    split = next((i for i, word in enumerate(words) if word in _RATES and i), len(words))
    if split == len(words) and _known(words[0]) and len(words) > 1:
        return Unit(_singular(words[0]), " ".join(words[1:]))
    return Unit(" ".join([*words[: split - 1], _singular(words[split - 1])]), _rate(words[split + 1 :], words[split:]))


def currency_unit(symbol: str, rest: str) -> Unit | None:
    """Return the unit of an amount behind a currency's symbol: "$5 per hour"."""
    unit = read_unit(rest)
    name = _singular(symbol)
    if unit is None or unit == PERCENT:
        return None
    if unit.name == name:
        return unit  # "$5 dollars"
    return Unit(name, re.sub(r"^(?:per|an?|every) ", "", f"{unit.name} {unit.rate}".strip()))


def _rate(words: list[str], whole: list[str]) -> str:
    return " ".join([*words[:-1], _singular(words[-1])]) if words else "each" if whole else ""


def _known(word: str) -> bool:
    return word in _UNITS or word in _OTHER_SHORT or word.partition("^")[0] in _UNITS


def _leaves_the_value(word: str) -> bool:
    if word in _UNITS or word in _RATES or word in _OTHER_SHORT:
        return True
    if not re.fullmatch(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|[a-z]+\^[23]", word):
        return False
    return word not in _CHANGE_THE_VALUE and not is_number_word(word) and not _is_product(word)


def _is_product(word: str) -> bool:
    """Tell "xy" and "abc", which are variables, from words."""
    return len(word) == 1 or bool(re.fullmatch(r"[xyz]+|[b-df-hj-np-tv-xz]{2,3}|abc?", word))


def _singular(word: str) -> str:
    if word in _UNITS:
        return _UNITS[word][0]
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("xes", "ches", "shes", "sses")):
        return word[:-2]
    return word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word
