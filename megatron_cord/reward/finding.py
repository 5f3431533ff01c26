"""The last number, time, date or ratio in a text, with all words that belong to its value.

What cannot be told apart is kept together: of "four or five" neither is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_cord.reward.moments import MOMENT_IN_TEXT, parse_date, parse_time
from megatron_cord.reward.numbers import DIGITS, parse_quantity
from megatron_cord.reward.ratios import parse_ratio
from megatron_cord.reward.wording.units import CURRENCIES, is_measured
from megatron_cord.reward.wording.words import SCALES, is_number_word, split_word, whole_number

_VULGAR = "[¼½¾⅐-⅞]"
_ITEM = re.compile(
    r"(?P<moment>\b(?:ratio|odds)(?:\s+(?:of|is|are)|:)?\s+(?:[0-9.]+|[a-z]+)(?:\s?:\s?|\s+to\s+)(?:[0-9.]+|[a-z]+)"
    rf"|{MOMENT_IN_TEXT})"
    r"|(?P<number>(?:(?<![\w.)])[-−–]\s?)?(?:[0-9]*\s?\\[dt]?frac\s*(?:\{-?[0-9]+\}\s*\{[0-9]+\}|[0-9][0-9])"
    rf"|(?:(?:us)?[{CURRENCIES}]\s?[-−]?)?(?<![\w.,])(?:{DIGITS})(?![.,:]?[0-9])"
    rf"(?:e[+-]?[0-9]+\b|\s*/\s*[0-9]+|\s?{_VULGAR})?(?:\s*\\?[%°¢€£](?:\s?[CF]\b)?|[a-zA-Z]\w*)?|{_VULGAR}))"
    r"|(?P<word>[a-z]+(?:['-][a-z]+)*)",
    re.IGNORECASE,
)
_JOINTS = {"and", "or", "a", "an", "of"}
_WITHIN = {"point", "over", "minus", "negative"}
_TAILS = {"percent", "am", "pm", "o'clock"}
_MOST = 24  #: items of a run
_LONGEST = 200  #: characters of a value


def last_value(text: str) -> str | None:
    """Return the last value of a text as it is written there; None for a text without numbers."""
    for run in reversed(_runs(text)):
        if value := _value(text, run):
            return value
    return None


def _runs(text: str) -> list[list[re.Match[str]]]:
    """Return the items that follow each other with nothing but spaces between them."""
    runs: list[list[re.Match[str]]] = [[]]
    for match in _ITEM.finditer(text):
        if not _belongs(match):
            runs.append([])
            continue
        if (last := runs[-1]) and (len(last) == _MOST or not _follows(text[last[-1].end() : match.start()], last[-1])):
            runs.append([])
        runs[-1].append(match)
    return runs


def _follows(between: str, last: re.Match[str]) -> bool:
    return not between.strip() or (between.strip() == "," and bool(last["word"]) and is_measured(last["word"].lower()))


def _belongs(match: re.Match[str]) -> bool:
    if match["word"] is None:
        return True
    word = match["word"].lower()
    return word in _JOINTS | _WITHIN | _TAILS or is_measured(word) or is_number_word(word)


def _value(text: str, run: Sequence[re.Match[str]]) -> str | None:
    """Return the value that ends a run and begins first, else what its numbers are as they stand."""
    words = [(match["word"] or "").lower() for match in run]
    starts = [i for i in range(len(run)) if _starts(words, i)]
    while words and words[-1] in _JOINTS | _WITHIN:
        words.pop()
    if not starts or starts[0] >= len(words):
        return None
    if "or" not in words[starts[0] :]:
        for last in range(len(words) - 1, -1, -1):
            if last + 1 < len(words) and not _separable(words, last, last + 1):
                continue
            for first in starts:
                if first <= last and (first == 0 or _separable(words, first - 1, first)):
                    answer = _written(text, run[first].start(), run[last].end())
                    if len(answer) <= _LONGEST and _is_value(answer):
                        return answer
    return _written(text, run[starts[0]].start(), run[len(words) - 1].end())[:_LONGEST]


def _separable(words: Sequence[str], left: int, right: int) -> bool:
    """Return whether a value may end with one item and another begin with the next."""
    joined = _counts(words[right]) and (not words[left] or _counts(words[left]))
    return not joined and not {words[left], words[right]} & (_WITHIN | {"of"})


def _counts(word: str) -> bool:
    return bool(word) and is_number_word(word)


def _starts(words: Sequence[str], place: int) -> bool:
    word, following = words[place], words[place + 1 : place + 2]
    if word in {"a", "an", "minus", "negative"}:
        return bool(following) and (following[0] in SCALES or (word not in {"a", "an"} and following[0] not in _JOINTS))
    return not word or whole_number(split_word(word)[:1]) is not None


def _is_value(answer: str) -> bool:
    return any(parse(answer) is not None for parse in (parse_quantity, parse_time, parse_date, parse_ratio))


def _written(text: str, start: int, end: int) -> str:
    answer = text[start:end].strip()
    if answer.startswith("$") and text[end : end + 1] == "$":
        return answer[1:]  # "$5$" is a formula
    line = text[text.rfind("\n", 0, start) + 1 : start]
    if "\n" in text[:start] and not line.strip() and re.match(r"[-–]\s", answer):
        return answer[1:].strip()  # an item of a list
    return answer
