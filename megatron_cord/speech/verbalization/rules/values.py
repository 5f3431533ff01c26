"""Numbers, fractions, and the signs that follow a value."""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.numbers import FRACTION, NUMBER, amount_words, number_words
from megatron_cord.speech.verbalization.rules.place import Place, Rule, rule


def _comma_chain(place: Place) -> str | None:
    chain = place.match[0]
    if re.fullmatch(NUMBER, chain):
        return None
    groups = chain.split(",")
    is_listed = len(groups) > 2 or (place.left in {"(", "["} and place.right in {")", "]"}) or place.in_formula
    if not is_listed or any(len(group) == 3 for group in groups[1:]):
        raise UnspeakableError(f"it contains {chain!r}, which may be one number or several")
    return " " + ", ".join(number_words(group) for group in groups) + " "


def _doubtful_number(place: Place) -> str:
    raise UnspeakableError(f"it contains {place.match[0]!r}, which may be one number or several")


def _scientific(place: Place) -> str:
    number, sign, exponent = place.match.groups()
    minus = "minus " if sign in {"-", "−"} else ""
    return f" {number_words(number)} times ten to the power of {minus}{number_words(exponent)} "


def _fraction(place: Place) -> str | None:
    return f" {amount_words(place.match[0])} "


def _number(place: Place) -> str:
    return f" {number_words(place.match[0])}" + ("" if place.after.startswith("'") else " ")


def _percent(place: Place) -> str:
    if not re.search(r"[\w)]\s?$", place.before):
        raise UnspeakableError("it contains '%' without a number")
    return " percent "


def _degrees(place: Place) -> str:
    if not re.search(r"[\w)]\s?$", place.before):
        raise UnspeakableError("it contains '°' without a number")
    return " degree " if re.search(r"(?<![\w.])1\s?$", place.before) else " degrees "


def _exclamation(place: Place) -> str | None:
    if not re.search(r"[0-9)]$|(?<![^\W\d_])[b-zB-HJ-Z]$", place.before):
        return None
    is_one_of_several = re.search(r"[0-9)]!\s?[-+*/×÷·−]", place.before) is not None
    if is_one_of_several or place.in_formula or place.right in set("+*/×÷·^=−-?)") - {""}:
        return " factorial "
    if re.search(r"[0-9)]$", place.before):
        raise UnspeakableError("it contains a number with '!', which may be a factorial or an exclamation")
    return None


def _unknown(place: Place) -> str | None:
    if place.left == "=" and not re.match(r"\s*[+*/×÷=-]", place.after):
        return "what?"
    if place.left in set("+*/×÷·=−-(") - {""} and re.match(r"\s*[-+*/×÷·=−)]", place.after):
        return " what "
    return " what " if re.match(r"\s*[+*/×÷·=]\s*[0-9]", place.after) and not place.before.strip() else None


def _dollar(place: Place) -> str:
    raise UnspeakableError("it contains a dollar sign that belongs to no price and no formula")


VALUES: tuple[Rule, ...] = (
    rule(r"(?<![\w.,])[0-9]+(?:,[0-9]+)+(?:\.[0-9]+)?(?![0-9])", _comma_chain),
    rule(r"[0-9]+(?:\.[0-9]+){2,}|(?<![\w.,])[0-9]{1,3}(?: [0-9]{3})+(?![\w./])", _doubtful_number),
    rule(r"(?<![\w.,])([0-9]+(?:\.[0-9]+)?)[eE]([+−-]?)([0-9]{1,3})(?![\w.])", _scientific),
    rule(rf"(?<![\w.,/^_])(?<!\*\*)(?<!\*\* )(?:[0-9]+\s+)?{FRACTION}(?!\s?(?:\^|\*\*|!)|[\w(])", _fraction),
    rule(rf"(?:{NUMBER})(?!\.[0-9])", _number),
    rule(r"\s?%", _percent),
    rule(r"\s?°", _degrees),
    rule(r"!", _exclamation),
    rule(r"\?", _unknown),
    rule(r"\$", _dollar),
)
