"""Chains of sums, answered step by step with mistakes and corrections: the task of the second comparison.

A chain is a start and four operations with numbers of one to nine, "nine plus four minus six plus two minus three"; the
value after each of them lies in 0..20. The answer goes through it step by step:

    nine plus four is thirteen . thirteen minus five is eight . no . thirteen minus six is seven . … . the answer is 6

One step in four is wrong at first (another operand, or another result) and is then corrected. A model that learned from
such answers is a soft teacher: at temperature 1 it errs as often, and after a wrong step, its own or the student's, it
continues with "no". So an answer that left the right path can come back to it, and a student that trains on its own
answers is taught how; one that trains on the teacher's best answers never sees a wrong step. That is the advantage that
this task gives to on-policy training.

The split is by chain: each has a number of its own, and every seventh is held out. What it simplifies: no chain has
more than four operations, and a mistake is always corrected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.quickstart.questions import Operation, Question, QuestionSource, number_in_words

STEPS = 4
LARGEST_OPERAND, LARGEST_RESULT = 9, 20
MISTAKES = 0.25  # of the steps, in a worked answer
_HELD_OUT = 7  # every so many chains
_PHRASINGS = ("{chain}", "what is {chain}", "how much is {chain}")
_OPERATIONS: tuple[Operation, ...] = ("plus", "minus")


@dataclass(frozen=True)
class Chain:
    """``start``, then an operation and an operand for each step."""

    start: int
    steps: tuple[tuple[Operation, int], ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The values after 0, 1, … all steps."""
        values = [self.start]
        for operation, operand in self.steps:
            values.append(apply(values[-1], operation, operand))
        return tuple(values)

    @property
    def number(self) -> int:
        """A number that no other chain has: its digits in base 18."""
        number = self.start
        for operation, operand in self.steps:
            number = 18 * number + 9 * _OPERATIONS.index(operation) + operand - 1
        return number

    @property
    def held_out(self) -> bool:
        """Whether it occurs in no training. Scattered, so that neither first nor last operand decides."""
        return (self.number * 2654435761 >> 7) % _HELD_OUT == 0

    def __str__(self) -> str:
        return " ".join(
            [
                number_in_words(self.start),
                *(f"{operation} {number_in_words(operand)}" for operation, operand in self.steps),
            ]
        )


def apply(value: int, operation: Operation, operand: int) -> int:
    """Return the result of one step."""
    return value + operand if operation == "plus" else value - operand


def draw_chain(draw: np.random.Generator) -> Chain:
    """Draw a chain whose every step stays in range."""
    start = value = int(draw.integers(1, LARGEST_OPERAND + 1))
    steps: list[tuple[Operation, int]] = []
    while len(steps) < STEPS:
        operation, operand = _OPERATIONS[int(draw.integers(2))], int(draw.integers(1, LARGEST_OPERAND + 1))
        if 0 <= apply(value, operation, operand) <= LARGEST_RESULT:
            value = apply(value, operation, operand)
            steps.append((operation, operand))
    return Chain(start, tuple(steps))


def solution(chain: Chain, draw: np.random.Generator, mistakes: float = MISTAKES) -> str:
    """Write a worked answer; a share ``mistakes`` of its steps is wrong at first."""
    parts: list[str] = []
    for value, after, (operation, operand) in zip(chain.values, chain.values[1:], chain.steps, strict=False):
        if draw.random() < mistakes:
            parts += [*_wrong_step(value, operation, operand, draw), ".", "no", "."]
        parts += [_step(value, operation, operand, after), "."]
    return " ".join([*parts, "the answer is", str(chain.values[-1])])


def draw_questions(count: int, seed: int, *, held_out: bool) -> list[Question]:
    """Draw ``count`` questions about different chains, those held out or the others, with worked answers."""
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(held_out)))))
    questions: dict[int, Question] = {}
    while len(questions) < count:
        chain, phrasing = draw_chain(draw), int(draw.integers(len(_PHRASINGS)))
        if chain.held_out == held_out and chain.number not in questions:
            questions[chain.number] = Question(
                id=f"chain-{chain.number}-{phrasing}",
                text=_PHRASINGS[phrasing].format(chain=chain),
                solution=solution(chain, draw),
                answer=str(chain.values[-1]),
            )
    return list(questions.values())


def vocabulary() -> list[str]:
    """Return every word of every question and answer, sorted."""
    numbers = range(LARGEST_RESULT + 1)
    words = {word for phrasing in _PHRASINGS for word in phrasing.format(chain="").split()}
    words |= (
        {*_OPERATIONS, "is", ".", "no", "the", "answer"}
        | {number_in_words(n) for n in numbers}
        | {str(n) for n in numbers}
    )
    return sorted(words)


#: The split's own seed has no effect here: which chains are held out is fixed.
CHAINS = QuestionSource(
    "chains",
    training=lambda count, seed, split_seed: draw_questions(count, seed, held_out=False),
    held_out=lambda count, seed, split_seed: draw_questions(count, seed, held_out=True),
)


def _step(value: int, operation: Operation, operand: int, result: int) -> str:
    return f"{number_in_words(value)} {operation} {number_in_words(operand)} is {number_in_words(result)}"


def _wrong_step(value: int, operation: Operation, operand: int, draw: np.random.Generator) -> list[str]:
    """Write a step with another operand, rightly computed, or with another result."""
    operands = [
        o for o in range(1, LARGEST_OPERAND + 1) if o != operand and 0 <= apply(value, operation, o) <= LARGEST_RESULT
    ]
    right = apply(value, operation, operand)
    if operands and draw.random() < 0.5:
        other = operands[int(draw.integers(len(operands)))]
        return [_step(value, operation, other, apply(value, operation, other))]
    results = [r for r in range(LARGEST_RESULT + 1) if r != right and abs(r - right) <= 3]
    return [_step(value, operation, operand, results[int(draw.integers(len(results)))])]
