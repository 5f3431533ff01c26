"""Rounds on a circle of seven numbers: the task with answers of more than two hundred tokens.

A chain is a start and three operations with numbers of one to three, "five plus three minus two plus one", and is gone
through ten times, the next round from where the last one ended; the numbers are 0 to 6, and 0 follows 6. The answer
writes out all thirty steps:

    round one five plus three is one . one minus two is six . six plus one is zero . round two zero plus three is …

One step in sixteen is wrong at first (another operand, or another result) and is then corrected, as in the chains of
sums, and for the same reason (examples/chains/questions.py). The question is as short as there: what was misheard once
is used, or mended, ten times.

The split is by chain: each has a number of its own, and every seventh is held out. What it simplifies: a mistake is
always corrected.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from examples.chains.questions import Chain
from examples.quickstart.questions import Operation, Question, QuestionSource, number_in_words
from megatron_cord.errors import CordError

STEPS, ROUNDS = 3, 10
CIRCLE = 7  #: numbers; a prime, so that ten rounds lead to any of them
LARGEST_START, LARGEST_OPERAND = 6, 3
MISTAKES = 1 / 16  # of the steps, in a worked answer
MOST_MISTAKES = 5  # of an answer, which bounds its length
OPERATIONS: tuple[Operation, ...] = ("plus", "minus")


def go(value: int, operation: Operation, operand: int) -> int:
    """Return the number that a step leads to."""
    return (value + operand if operation == "plus" else value - operand) % CIRCLE


def all_chains() -> Iterator[Chain]:
    """Yield every chain."""
    steps = list(product(OPERATIONS, range(1, LARGEST_OPERAND + 1)))
    for start, chosen in product(range(1, LARGEST_START + 1), product(steps, repeat=STEPS)):
        yield Chain(start, chosen)


def draw_chain(draw: np.random.Generator) -> Chain:
    """Draw a start and the operations of a round."""
    start, operands = int(draw.integers(1, LARGEST_START + 1)), draw.integers(1, LARGEST_OPERAND + 1, size=STEPS)
    return Chain(start, tuple((OPERATIONS[int(draw.integers(2))], int(operand)) for operand in operands))


def final_value(chain: Chain) -> int:
    """Return the number after all rounds."""
    value = chain.start
    for operation, operand in chain.steps * ROUNDS:
        value = go(value, operation, operand)
    return value


def solution(chain: Chain, draw: np.random.Generator, mistakes: float = MISTAKES) -> str:
    """Write a worked answer; a share ``mistakes`` of its steps, but no more than the most, is wrong at first."""
    words: list[str] = []
    value, wrong = chain.start, 0
    for number in range(1, ROUNDS + 1):
        words += ["round", number_in_words(number)]
        for operation, operand in chain.steps:
            if draw.random() < mistakes and wrong < MOST_MISTAKES:
                wrong += 1
                words += [_wrong_step(value, operation, operand, draw), ". no ."]
            after = go(value, operation, operand)
            words += [_step(value, operation, operand, after), "."]
            value = after
    return " ".join([*words, "the answer is", str(value)])


def draw_questions(count: int, seed: int, *, held_out: bool) -> list[Question]:
    """Draw ``count`` questions about chains, those held out or the others, with worked answers.

    Those held out are all different; the others may come again with other mistakes.

    Raises:
        CordError: there are not so many chains that are held out.
    """
    if held_out and count > (most := sum(chain.held_out for chain in all_chains())):
        raise CordError(f"{count} different chains that are held out: there are {most}; draw no more than that")
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(held_out)))))
    questions: list[Question] = []
    seen: set[int] = set()
    while len(questions) < count:
        chain = draw_chain(draw)
        if chain.held_out == held_out and not (held_out and chain.number in seen):
            seen.add(chain.number)
            worked, answer = solution(chain, draw), str(final_value(chain))
            questions.append(Question(f"rounds-{chain.number}", str(chain), worked, answer))
    return questions


def drills() -> list[Question]:
    """Return all single steps as questions.

    In a long answer a step's three words are few among two hundred: attention to them is found much later there.
    """
    questions = []
    for value, operation, operand in product(range(CIRCLE), OPERATIONS, range(1, LARGEST_OPERAND + 1)):
        after = go(value, operation, operand)
        step = _step(value, operation, operand, after)
        name, text = f"drill-{value}-{operation}-{operand}", step.partition(" is ")[0]
        questions.append(Question(name, text, f"{step} . the answer is {after}", str(after)))
    return questions


def vocabulary() -> list[str]:
    """Return every word of every question and answer, sorted."""
    words = {*OPERATIONS, "round", "is", ".", "no", "the", "answer"}
    return sorted(words | {number_in_words(n) for n in range(ROUNDS + 1)} | {str(n) for n in range(CIRCLE)})


#: The split's own seed has no effect here: which chains are held out is fixed.
ROUNDS_TASK = QuestionSource(
    "rounds",
    training=lambda count, seed, split_seed: draw_questions(count, seed, held_out=False),
    held_out=lambda count, seed, split_seed: draw_questions(count, seed, held_out=True),
)


def _step(value: int, operation: Operation, operand: int, result: int) -> str:
    return f"{number_in_words(value)} {operation} {number_in_words(operand)} is {number_in_words(result)}"


def _wrong_step(value: int, operation: Operation, operand: int, draw: np.random.Generator) -> str:
    """Write a step with another operand, rightly computed, or with another result."""
    if draw.random() < 0.5:
        other = (operand - 1 + int(draw.integers(1, LARGEST_OPERAND))) % LARGEST_OPERAND + 1
        return _step(value, operation, other, go(value, operation, other))
    return _step(value, operation, operand, (go(value, operation, operand) + int(draw.integers(1, CIRCLE))) % CIRCLE)
