"""Is a response right? Choices by letter or by their text, free answers by rules or by a judge.

A response that names no choice, or two of them, is not right; how many named none is counted, since a model that does not answer in the asked
form looks like one that does not know. Texts come from a model that may babble: nothing here raises, and every length is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.data.question_files import LETTERS
from megatron_cord.reward.answers import answers_agree, extract_answer, stated_answer
from megatron_cord.reward.comparison import Comparer, Comparison

_LONGEST = 8192  # characters, from the end
_TAIL = 400  # characters from the end in which a free answer in words is looked for
_FIRST = re.compile(r"\W*([A-J])\s*(?:[.:,)]|$|\n)")
_NAMED = re.compile(r"\(([A-J])\)|\b(?:option|choice|answer)\s*:?\s*(?:is\s+)?\(?([A-J])\b", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w'])([B-HJ])(?![\w'])")  # A and I are words too


@dataclass(frozen=True)
class Score:
    """What a response was taken to answer, None for nothing, and whether that is right."""

    answer: str | None
    correct: bool


def score_responses(
    gold: Sequence[str],
    choices: Sequence[Sequence[str]],
    responses: Sequence[str],
    questions: Sequence[str],
    comparer: Comparer | None,
) -> list[Score]:
    """One score each, in the same order.

    Args:
        gold: right answers; letters where there are choices.
        choices: the texts behind the letters; empty for free answers.
        responses: what the model said.
        questions: what was asked, for the comparer.
        comparer: decides about free answers, a `Judge` for example; None goes by rules.
    """
    scores = [_score(g, c, r) for g, c, r in zip(gold, choices, responses, strict=True)]
    if comparer is None:
        return scores
    free = [i for i, offered in enumerate(choices) if not offered]
    verdicts = comparer.compare([Comparison(questions[i], responses[i], gold[i], bare=True) for i in free])
    for i, verdict in zip(free, verdicts, strict=True):
        # Where a judge gave no answer, the rules that hold without one decide.
        scores[i] = scores[i] if verdict.source == "fallback" else Score(scores[i].answer, verdict.agrees)
    return scores


def is_correct(gold: str, choices: Sequence[str], response: str) -> bool:
    """Whether one response is right, by rules."""
    return _score(gold, choices, response).correct


def chosen(response: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a response decides on; None for none, or for several.

    In this order: what it states as its answer (a box, `####`, "the answer is"), as a letter or as a choice's text; a letter that it begins
    with; the last letter in brackets or after "option"; the one choice whose text it contains; the one letter that stands alone.
    """
    response = response[-_LONGEST:].strip()
    letters = LETTERS[: len(choices)]
    if (stated := stated_answer(response)) and (letter := _letter_of(stated, letters) or _text_of(stated, choices)):
        return letter
    if (first := _FIRST.match(response)) and first[1] in letters:
        return first[1]
    named = [(match[1] or match[2]).upper() for match in _NAMED.finditer(response)]
    if named and named[-1] in letters:
        return named[-1]
    if by_text := _text_of(response, choices):
        return by_text
    alone = set(_ALONE.findall(response)) & set(letters)
    return alone.pop() if len(alone) == 1 else None


def _score(gold: str, choices: Sequence[str], response: str) -> Score:
    if choices:
        letter = chosen(response, choices)
        return Score(letter, letter == gold)
    answer = extract_answer(response)
    if answer is not None and answers_agree(answer, gold):
        return Score(answer, True)
    # A gold answer in words, where the response states none in a form that the rules know.
    if not any(character.isdigit() for character in gold) and stated_answer(response) is None:
        tail = response[-_TAIL:]
        return Score(answer or " ".join(tail.split())[-80:] or None, _contains(tail, gold))
    return Score(answer, False)


def _letter_of(text: str, letters: str) -> str | None:
    match = re.fullmatch(r"\W*([A-Ja-j])\W*|\W*([A-J])\W+\S.*", text, re.DOTALL)
    letter = (match[1] or match[2]).upper() if match else ""
    return letter if letter and letter in letters else None


def _text_of(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice whose text is in the response; of two where one holds the other ("gas", "natural gas"), the longer."""
    found = [i for i, choice in enumerate(choices) if choice and _contains(text, choice)]
    longest = [i for i in found if not any(i != k and _contains(choices[k], choices[i]) for k in found)]
    return LETTERS[longest[0]] if len(longest) == 1 else None


def _contains(text: str, phrase: str) -> bool:
    """Whether the phrase's words follow each other in the text, whatever its case and punctuation."""
    words = _words(phrase)
    return bool(words) and f" {words} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
