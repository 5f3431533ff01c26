"""Comparison of a response with a reference: the final answers of both, by rules or by another `Comparer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_cord.reward.answers import answers_agree, extract_answer
from megatron_cord.reward.choices import affirms
from megatron_cord.reward.stated import stated_answer

_TAIL = 400  # characters from the end in which a free answer in words is looked for


@dataclass(frozen=True)
class Comparison:
    """One response beside one reference.

    Attributes:
        question: that both answer.
        response: the student's text.
        reference: the teacher's text for the same question, or the gold answer.
        bare: the reference is a final answer and nothing else.
        choices: the texts behind the letters that the question offers; empty for a question that offers none.
    """

    question: str
    response: str
    reference: str
    bare: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether response and reference have the same final answer.

    Attributes:
        agrees: the decision.
        matched: the result of answer matching, whatever decided.
        source: what decided; "fallback" is answer matching where the judge gave no answer.
    """

    agrees: bool
    matched: bool
    source: Literal["match", "judge", "fallback"]


class Comparer(Protocol):
    """Compares responses with references."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict each, in the same order."""
        ...


class AnswerMatcher:
    """Compares final answers by the rules of `answers`; a text without one agrees with nothing."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict each, in the same order."""
        return [Verdict(agrees, agrees, "match") for agrees in map(answers_match, comparisons)]


@dataclass(frozen=True)
class Match:
    """The answer found in a response, None for none, and whether it is the reference's."""

    answer: str | None
    agrees: bool


def answers_match(comparison: Comparison) -> bool:
    """Return whether both have a final answer, and the same."""
    return match_answers(comparison).agrees


def match_answers(comparison: Comparison) -> Match:
    """Find the final answers of both and compare them: the one set of rules of rewards and evaluation.

    A bare reference in words counts where a response without a stated answer has it in its last words and does not
    deny it: "It is Paris."
    """
    choices, response, reference = comparison.choices, comparison.response, comparison.reference
    found = extract_answer(response, choices=choices)
    expected = reference if comparison.bare else extract_answer(reference, choices=choices)
    if found is not None and expected is not None and answers_agree(found, expected, choices=choices):
        return Match(found, True)
    if choices or not comparison.bare or any(c.isdigit() for c in reference) or stated_answer(response) is not None:
        return Match(found, False)
    tail = response[-_TAIL:]
    return Match(found or " ".join(tail.split())[-80:] or None, affirms(tail, reference))
