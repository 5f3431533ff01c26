"""Small sums in words, with worked answers: the task of the quickstart and of the tests.

A problem is (a, operation, b) with a and b in 1..16. Each has four phrasings and one answer, in lower-case words
separated by spaces, so that a word-level tokenizer needs only ``vocabulary()``. The split is by problem: a held-out
problem does not occur in training, in any phrasing.

What it simplifies: a subtraction never goes below zero (pairs with a < b are left out, 136 of 256 remain), and the
mirror image of a held-out addition (5 + 7 for 7 + 5) may be a training problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_cord.data.number_words import cardinal
from megatron_cord.data.ordering.order import permutation
from megatron_cord.errors import CordError

Operation = Literal["plus", "minus"]

LARGEST_OPERAND = 16
_OPERATIONS: tuple[Operation, ...] = ("plus", "minus")
_PHRASINGS: dict[Operation, tuple[str, ...]] = {
    "plus": (
        "what is {a} plus {b}",
        "add {a} and {b}",
        "{a} {apples_a} plus {b} {apples_b}",
        "how much is {a} and {b}",
    ),
    "minus": (
        "what is {a} minus {b}",
        "take {b} from {a}",
        "{a} {apples_a} minus {b} {apples_b}",
        "how much is {a} less {b}",
    ),
}


@dataclass(frozen=True, order=True)
class Problem:
    """``a`` plus or minus ``b``."""

    a: int
    operation: Operation
    b: int

    @property
    def result(self) -> int:
        """The value, between 0 and 32."""
        return self.a + self.b if self.operation == "plus" else self.a - self.b


@dataclass(frozen=True)
class Question:
    """One phrasing of one problem.

    Attributes:
        id: for example "plus-7-5-2": the problem and the number of the phrasing.
        text: written or spoken, "seven apples plus five apples".
        solution: "seven plus five is twelve . the answer is 12".
        answer: the result in digits, "12": the last word of the solution.
    """

    id: str
    text: str
    solution: str
    answer: str


@dataclass(frozen=True)
class QuestionSource:
    """A task: the source of the questions of spoken sets (``spoken_sums``).

    Attributes:
        name: kept in the manifest of a set.
        training: ``count`` questions to train on, by (count, seed, split_seed).
        held_out: questions of the evaluation, likewise; none of them is a training question, whatever the seed.
    """

    name: str
    training: Callable[[int, int, int], list[Question]]
    held_out: Callable[[int, int, int], list[Question]]


@dataclass(frozen=True)
class ProblemSplit:
    """Two disjoint sets of problems, each sorted."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def number_in_words(number: int) -> str:
    """Return 0 to 39 in words, tens and units apart: "twenty four"."""
    if not 0 <= number <= 39:
        raise ValueError(f"only 0 to 39 have words here, not {number}")
    return cardinal(number)


@cache
def all_problems() -> tuple[Problem, ...]:
    """Return all 392 problems (256 additions, 136 subtractions), sorted."""
    operands = range(1, LARGEST_OPERAND + 1)
    problems = (Problem(a, operation, b) for operation in _OPERATIONS for a in operands for b in operands)
    return tuple(sorted(problem for problem in problems if problem.result >= 0))


def split_problems(seed: int = 0, held_out_fraction: float = 0.15) -> ProblemSplit:
    """Hold out the same fraction of additions and of subtractions, drawn by ``seed``.

    Raises:
        CordError: the fraction is not between 0 and 1, both excluded.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise CordError(f"held_out_fraction is {held_out_fraction}; choose a number between 0 and 1")
    held_out: set[Problem] = set()
    for index, operation in enumerate(_OPERATIONS):
        problems = [problem for problem in all_problems() if problem.operation == operation]
        count = round(len(problems) * held_out_fraction)
        held_out.update(problems[i] for i in permutation(len(problems), seed, index)[:count])
    return ProblemSplit(
        train=tuple(problem for problem in all_problems() if problem not in held_out),
        held_out=tuple(sorted(held_out)),
    )


def questions_about(problems: Sequence[Problem]) -> list[Question]:
    """Return every phrasing of every problem, in the order of the problems."""
    return [
        _phrase(problem, phrasing) for problem in problems for phrasing in range(len(_PHRASINGS[problem.operation]))
    ]


def draw_questions(problems: Sequence[Problem], count: int, seed: int) -> list[Question]:
    """Draw ``count`` questions in an order given by ``seed``; none comes again before all others came once.

    Raises:
        CordError: there are no problems.
    """
    pool = questions_about(problems)
    if not pool:
        raise CordError("no problems to draw questions from; hold out fewer or more of them")
    rounds = -(-count // len(pool))
    return [pool[i] for turn in range(rounds) for i in permutation(len(pool), seed, turn)][:count]


def training_questions(count: int, seed: int, split_seed: int = 0) -> list[Question]:
    """Draw ``count`` questions about the training problems (1336 different ones by default)."""
    return draw_questions(split_problems(split_seed).train, count, seed)


def heldout_questions(count: int, seed: int, split_seed: int = 0) -> list[Question]:
    """Draw ``count`` questions about the held-out problems (232 different ones by default)."""
    return draw_questions(split_problems(split_seed).held_out, count, seed)


SUMS = QuestionSource("sums", training_questions, heldout_questions)  #: the task of this module


@cache
def _vocabulary() -> tuple[str, ...]:
    words: set[str] = set()
    for question in questions_about(all_problems()):
        words.update(question.text.split(), question.solution.split())
    return tuple(sorted(words))


def vocabulary() -> list[str]:
    """Return every word of every question and solution, sorted; the tokenizer adds its special tokens."""
    return list(_vocabulary())


def _phrase(problem: Problem, phrasing: int) -> Question:
    a, b, operation = problem.a, problem.b, problem.operation
    words_a, words_b = number_in_words(a), number_in_words(b)
    result = number_in_words(problem.result)
    return Question(
        id=f"{operation}-{a}-{b}-{phrasing}",
        text=_PHRASINGS[operation][phrasing].format(a=words_a, b=words_b, apples_a=_apples(a), apples_b=_apples(b)),
        solution=f"{words_a} {operation} {words_b} is {result} . the answer is {problem.result}",
        answer=str(problem.result),
    )


def _apples(count: int) -> str:
    return "apple" if count == 1 else "apples"
