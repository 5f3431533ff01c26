"""What a rule gets and returns.

A set without a rule of its own goes by `megatron_cord.evaluation.scoring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_cord.reward import Judge


@dataclass(frozen=True)
class Score:
    """The answer found in a response, None for none, and whether it is right.

    Attributes:
        answer: what was found.
        correct: whether it counts as right as a whole.
        value: the question's part in the set's score where that is no plain accuracy; the score is the mean of these.
        measures: other numbers by name, of which the set's result has the means.
    """

    answer: str | None
    correct: bool
    value: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A response beside its question.

    Attributes:
        id: of the question.
        question: its text.
        answer: the gold answer; for choices the letter; "" where there is none.
        response: of the model.
        choices: the texts behind the letters; empty for a question without choices.
        group: of the question.
    """

    id: str
    question: str
    answer: str
    response: str
    choices: tuple[str, ...] = ()
    group: str | None = None


class Rule(Protocol):
    """Scores the responses to a set."""

    @property
    def judged(self) -> bool:
        """Whether a language model decides."""
        ...

    def score(self, replies: Sequence[Reply], judge: Judge | None) -> list[Score]:
        """Return one score a reply, in the same order.

        Args:
            replies: all of one set and one modality.
            judge: decides where `judged`.

        Raises:
            CordError: the judge refuses to work, or leaves replies without a verdict.
        """
        ...


class EachByItself(ABC):
    """A rule that looks at one reply at a time and needs no judge."""

    judged = False

    def score(self, replies: Sequence[Reply], judge: Judge | None = None) -> list[Score]:
        """Implement `Rule.score`."""
        return [self.score_one(reply) for reply in replies]

    @abstractmethod
    def score_one(self, reply: Reply) -> Score:
        """Return the score of one reply."""
