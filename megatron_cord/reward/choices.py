"""Multiple choice: the letter that a response decides on.

A response that names no choice, or two of them, decides on none. Responses may be any text: nothing here raises, and
every length is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_cord.data.choices import LETTERS
from megatron_cord.reward.stated import stated_answer

_LONGEST_TEXT = 8192  # characters, from the end
_FIRST = re.compile(r"\W*([A-J])\s*(?:[.:,)]|$|\n)")
_NAMED = re.compile(r"\(([A-J])\)|\b(?:option|choice|answer)\s*:?\s*(?:is\s+)?\(?([A-J])\b", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w'])([B-HJ])(?![\w'])")  # A and I are words too


def chosen_letter(response: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a response decides on; None for none, or for several.

    In this order: what it states as its answer (a box, `####`, "the answer is"), as a letter or as a choice's text; a
    letter that it begins with; the last letter in brackets or after "option"; the one choice whose text it contains;
    the one letter that stands alone.

    Args:
        response: any text.
        choices: the texts behind the letters; an empty one is not known, and its letter alone counts.
    """
    response = response[-_LONGEST_TEXT:].strip()
    letters = LETTERS[: len(choices)]
    if (stated := stated_answer(response)) and (letter := letter_of(stated, choices)):
        return letter
    if (first := _FIRST.match(response)) and first[1] in letters:
        return first[1]
    named = [(match[1] or match[2]).upper() for match in _NAMED.finditer(response)]
    if named and named[-1] in letters:
        return named[-1]
    if by_text := _letter_by_text(response, choices):
        return by_text
    alone = set(_ALONE.findall(response)) & set(letters)
    return alone.pop() if len(alone) == 1 else None


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that a final answer means, given as a letter or as a choice's text; None for neither."""
    return _letter_by_name(answer, LETTERS[: len(choices)]) or _letter_by_text(answer, choices)


def contains_phrase(text: str, phrase: str) -> bool:
    """Return whether the phrase's words follow each other in the text, whatever its case and punctuation."""
    words = _words(phrase)
    return bool(words) and f" {words} " in f" {_words(text)} "


def _letter_by_name(text: str, letters: str) -> str | None:
    match = re.fullmatch(r"\W*([A-Ja-j])\W*|\W*([A-J])\W+\S.*", text, re.DOTALL)
    letter = (match[1] or match[2]).upper() if match else ""
    return letter if letter and letter in letters else None


def _letter_by_text(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice whose text is in the response.

    Of two where one holds the other ("gas", "natural gas"), the longer counts.
    """
    found = [i for i, choice in enumerate(choices) if choice and contains_phrase(text, choice)]
    longest = [i for i in found if not any(i != k and contains_phrase(choices[k], choices[i]) for k in found)]
    return LETTERS[longest[0]] if len(longest) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
