"""Final answers: finding one at the end of a worked solution, and telling whether two of them mean the same.

One set of rules for rewards, the judge's cross-check and evaluation. Responses may be any text, so every rule works on
bounded lengths and none of them raises. Simplification: English, one answer a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_cord.reward.agreement import LETTER, LETTERED, same_answer
from megatron_cord.reward.choices import chosen_letter, letter_of
from megatron_cord.reward.finding import last_value
from megatron_cord.reward.stated import LONGEST_ANSWER, LONGEST_TEXT, stated_answer

_CHOICE_IN_TEXT = re.compile(r"\(([A-J])\)|\b(?:option|choice)\s+([A-J])\b")


def extract_answer(response: str, *, choices: Sequence[str] | None = None) -> str | None:
    r"""Return the final answer of a response, or None.

    In this order, the last of its kind: ``\boxed{…}``; ``<answer>``; what follows ``####``; what follows "the answer
    is"; a number, time, date or ratio, in digits or words; a choice such as "(B)".

    Args:
        response: any text.
        choices: the texts behind the letters A, B, …: the answer is then the letter of one of them (see
            `choices.chosen_letter`). None, or an empty sequence: a free answer.
    """
    if choices:
        return chosen_letter(response, choices)
    text = response[-LONGEST_TEXT:]
    if stated := stated_answer(text):
        return stated
    if value := last_value(text):
        return value
    if letters := [match[1] or match[2] for match in _CHOICE_IN_TEXT.finditer(text)]:
        return letters[-1]
    bare = text.strip()
    return bare if len(bare) <= LONGEST_ANSWER and (LETTER.fullmatch(bare) or LETTERED.fullmatch(bare)) else None


def answers_agree(a: str, b: str, *, choices: Sequence[str] | None = None) -> bool:
    """Return whether two final answers mean the same.

    Args:
        a: a final answer, as `extract_answer` returns it.
        b: another one.
        choices: the texts behind the letters A, B, …: both answers must then mean the same one of them.
    """
    if choices:
        letters = [letter_of(answer[-LONGEST_TEXT:], choices) for answer in (a, b)]
        return letters[0] is not None and letters[0] == letters[1]
    return same_answer(a, b)
