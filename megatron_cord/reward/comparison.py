"""Comparison of a response with a reference: the final answers of both, by rules or by another `Comparer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_cord.reward.answers import answers_agree, extract_answer


@dataclass(frozen=True)
class Comparison:
    """One response beside one reference.

    Attributes:
        question: that both answer.
        response: the student's text.
        reference: the teacher's text for the same question, or the gold answer.
        bare: the reference is a final answer and nothing else.
    """

    question: str
    response: str
    reference: str
    bare: bool = False


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


def answers_match(comparison: Comparison) -> bool:
    """Return whether both have a final answer, and the same."""
    found = extract_answer(comparison.response)
    expected = comparison.reference if comparison.bare else extract_answer(comparison.reference)
    return found is not None and expected is not None and answers_agree(found, expected)
