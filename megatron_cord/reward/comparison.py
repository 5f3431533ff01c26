"""Does a response end in the reference's answer? The question, the verdict, and the one that needs nothing but rules: answer matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_cord.reward.answers import answers_agree, extract_answer


@dataclass(frozen=True)
class Comparison:
    """One response beside one reference.

    Attributes:
        question: what both answer.
        response: what the student said, decoded.
        reference: what the teacher said to the same question, or the gold answer.
        bare: the reference is a final answer and nothing else.
    """

    question: str
    response: str
    reference: str
    bare: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether the two mean the same.

    Attributes:
        agrees: what counts.
        matched: what answer matching says, whoever decided.
        source: who decided; "fallback" is answer matching where the judge gave no answer.
    """

    agrees: bool
    matched: bool
    source: Literal["match", "judge", "fallback"]


class Comparer(Protocol):
    """Compares responses with references."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict each, in the same order."""
        ...


class AnswerMatcher:
    """Agreement of the two final answers (`answers.extract_answer`, `answers.answers_agree`); none agrees with a text that has none."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict each, in the same order."""
        return [Verdict(agrees, agrees, "match") for agrees in map(answers_match, comparisons)]


def answers_match(comparison: Comparison) -> bool:
    """Whether both have a final answer, and the same."""
    said = extract_answer(comparison.response)
    wanted = comparison.reference if comparison.bare else extract_answer(comparison.reference)
    return said is not None and wanted is not None and answers_agree(said, wanted)
