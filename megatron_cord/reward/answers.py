"""Final answers: finding one at the end of a worked solution, and telling whether two of them mean the same.

Texts come from a model that may babble, so every rule works on bounded lengths and none of them raises. Simplification: English
phrases, one answer a text.
"""

from __future__ import annotations

import logging
import re

from megatron_cord.reward.numbers import NUMBER_IN_TEXT, parse_quantity
from megatron_cord.reward.patience import within

_LONGEST_TEXT = 8192  # characters, from the end, where the answer stands
_LONGEST_ANSWER = 200
_PATIENCE = 2.0  # seconds for one comparison of expressions
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*(?=([^\n]*))", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\s*[.!?;](?:\s|$)")
_CHOICE_IN_TEXT = re.compile(r"\(([A-J])\)|\b(?:option|choice)\s+([A-J])\b")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?[.:]?|\(?([A-J])(?:\)|[.:])\s+\S.*")

# What sympy may be asked about. Towers of powers, factorials and the like end in one huge multiplication that nothing interrupts.
_COMMANDS = {
    "frac",
    "dfrac",
    "tfrac",
    "sqrt",
    "pi",
    "left",
    "right",
    "cdot",
    "times",
    "pm",
    "infty",
    "text",
    "cup",
    "in",
}
_LONG_POWER = re.compile(r"(?:\^|\*\*)[^\d]{0,3}\d{4,}")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a solution, or None.

    In this order, the last of its kind: ``\boxed{…}``; what follows ``####``; what follows "the answer is"; a number, in digits
    or words; a choice such as "(B)".
    """
    text = text[-_LONGEST_TEXT:]
    if stated := _stated(text):
        return stated
    if numbers := [match[0].strip() for match in NUMBER_IN_TEXT.finditer(text)]:
        return numbers[-1][:_LONGEST_ANSWER]
    if choices := [match[1] or match[2] for match in _CHOICE_IN_TEXT.finditer(text)]:
        return choices[-1]
    return text.strip() if _CHOICE.fullmatch(text.strip()) else None


def stated_answer(text: str) -> str | None:
    r"""What a solution calls its final answer, by ``\boxed{…}``, ``####`` or "the answer is"; None if it calls nothing so."""
    return _stated(text[-_LONGEST_TEXT:]) or None


def states_answer(text: str) -> bool:
    """Whether a solution says which answer is its final one."""
    return stated_answer(text) is not None


def answers_agree(first: str, second: str) -> bool:
    """Whether two final answers mean the same: choices by letter, numbers by value, words as written, the rest by ``math_verify``."""
    first, second = (" ".join(answer[: _LONGEST_ANSWER + 1].split()) for answer in (first, second))
    if not first or not second:
        return False
    choices = _choice(first), _choice(second)
    if choices[0] and choices[1]:
        return choices[0] == choices[1]
    quantities = parse_quantity(first), parse_quantity(second)
    if quantities[0] and quantities[1]:
        return quantities[0].agrees(quantities[1])
    if _plain(first) == _plain(second):
        return True
    return _bounded(first) and _bounded(second) and _equal_expressions(first, second)


def _stated(text: str) -> str | None:
    """The answer behind the first of the markers that the text has."""
    if boxed := _last_boxed(text):
        return boxed
    if "####" in text and (marked := text.rsplit("####", 1)[1].strip().split("\n")[0].strip()):
        return marked[:_LONGEST_ANSWER]
    phrases = [
        phrase
        for match in _PHRASE.finditer(text)
        if (phrase := _SENTENCE_END.split(match[1], maxsplit=1)[0].strip(" *"))
    ]
    return phrases[-1][:_LONGEST_ANSWER] if phrases else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place].strip()[:_LONGEST_ANSWER] or None
    return None


def _choice(answer: str) -> str | None:
    match = _CHOICE.fullmatch(answer)
    return (match[1] or match[2]).upper() if match else None


def _plain(answer: str) -> str:
    return answer.strip(" .!?$\"'*").casefold()


def _bounded(answer: str) -> bool:
    """Short, without words, and free of what sympy may not finish; an expression has a digit or a command in it."""
    powers = answer.count("^") + answer.count("**")
    return (
        len(answer) <= _LONGEST_ANSWER
        and "!" not in answer
        and powers <= 2
        and (powers < 2 or not re.search(r"\^[^+\-=,]*\^|\*\*[^+\-=,]*\*\*", answer))
        and not _LONG_POWER.search(answer)
        and set(re.findall(r"\\([A-Za-z]+)", answer)) <= _COMMANDS
        and not re.search(r"(?<!\\)\b[A-Za-z]{4,}", answer)
        and bool(re.search(r"\d|\\|[-+=^/*]", answer))
    )


def _equal_expressions(first: str, second: str) -> bool:
    from math_verify import parse, verify  # sympy takes a second to import, and plain numbers do without

    def compare() -> bool:
        expressions = [parse(f"${answer.strip('$')}$", parsing_timeout=None) for answer in (first, second)]
        return bool(all(expressions) and verify(*expressions, timeout_seconds=None))

    # Its own timeouts rest on signals and so work in the main thread only; without them it warns at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return within(_PATIENCE, compare, otherwise=False)
