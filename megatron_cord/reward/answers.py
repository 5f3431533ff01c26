"""Final answers: finding one at the end of a worked solution, and telling whether two of them mean the same.

One set of rules for rewards and evaluation. Responses may be any text, so every rule works on bounded lengths and none
of them raises. Simplification: English phrases, one answer a text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from megatron_cord.reward.choices import chosen_letter, letter_of
from megatron_cord.reward.numbers import NUMBER_IN_TEXT, parse_quantity
from megatron_cord.reward.patience import within
from megatron_cord.reward.stated import LONGEST_ANSWER, LONGEST_TEXT, stated_answer

_PATIENCE = 2.0  # seconds for one comparison of expressions
_CHOICE_IN_TEXT = re.compile(r"\(([A-J])\)|\b(?:option|choice)\s+([A-J])\b")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?[.:]?|\(?([A-J])(?:\)|[.:])\s+\S.*")

# What sympy may compute. Towers of powers, factorials and the like end in one huge multiplication that nothing
# interrupts.
_COMMANDS = {
    *("frac", "dfrac", "tfrac", "sqrt", "pi", "left", "right"),
    *("cdot", "times", "pm", "infty", "text", "cup", "in"),
}
_LONG_POWER = re.compile(r"(?:\^|\*\*)[^\d]{0,3}\d{4,}")


def extract_answer(response: str, *, choices: Sequence[str] | None = None) -> str | None:
    r"""Return the final answer of a response, or None.

    In this order, the last of its kind: ``\boxed{…}``; what follows ``####``; what follows "the answer is"; a number,
    in digits or words; a choice such as "(B)".

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
    if numbers := [match[0].strip() for match in NUMBER_IN_TEXT.finditer(text)]:
        return numbers[-1][:LONGEST_ANSWER]
    if letters := [match[1] or match[2] for match in _CHOICE_IN_TEXT.finditer(text)]:
        return letters[-1]
    return text.strip() if _CHOICE.fullmatch(text.strip()) else None


def answers_agree(a: str, b: str, *, choices: Sequence[str] | None = None) -> bool:
    """Return whether two final answers mean the same.

    Choices are compared by letter, numbers by value, words as written, the rest by ``math_verify``.

    Args:
        a: a final answer, as `extract_answer` returns it.
        b: another one.
        choices: the texts behind the letters A, B, …: both answers must then mean the same one of them.
    """
    if choices:
        letters = [letter_of(answer[-LONGEST_TEXT:], choices) for answer in (a, b)]
        return letters[0] is not None and letters[0] == letters[1]
    a, b = (" ".join(answer[: LONGEST_ANSWER + 1].split()) for answer in (a, b))
    if not a or not b:
        return False
    options = _choice(a), _choice(b)
    if options[0] and options[1]:
        return options[0] == options[1]
    quantities = parse_quantity(a), parse_quantity(b)
    if quantities[0] and quantities[1]:
        return quantities[0].agrees(quantities[1])
    if _plain(a) == _plain(b):
        return True
    return _bounded(a) and _bounded(b) and _equal_expressions(a, b)


def _choice(answer: str) -> str | None:
    match = _CHOICE.fullmatch(answer)
    return (match[1] or match[2]).upper() if match else None


def _plain(answer: str) -> str:
    return answer.strip(" .!?$\"'*").casefold()


def _bounded(answer: str) -> bool:
    """Tell expressions that are safe to compute: short, without words, with a digit or a command in them."""
    powers = answer.count("^") + answer.count("**")
    return (
        len(answer) <= LONGEST_ANSWER
        and "!" not in answer
        and powers <= 2
        and (powers < 2 or not re.search(r"\^[^+\-=,]*\^|\*\*[^+\-=,]*\*\*", answer))
        and not _LONG_POWER.search(answer)
        and set(re.findall(r"\\([A-Za-z]+)", answer)) <= _COMMANDS
        and not re.search(r"(?<!\\)\b[A-Za-z]{4,}", answer)
        and bool(re.search(r"\d|\\|[-+=^/*]", answer))
    )


def _equal_expressions(first: str, second: str) -> bool:
    from math_verify import parse, verify  # sympy takes a second to import, and plain numbers need none of it

    def compare() -> bool:
        expressions = [parse(f"${answer.strip('$')}$", parsing_timeout=None) for answer in (first, second)]
        return bool(all(expressions) and verify(*expressions, timeout_seconds=None))

    # Its own timeouts use signals, which work in the main thread only; without them it warns at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return within(_PATIENCE, compare, otherwise=False)
