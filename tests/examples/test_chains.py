"""Chains of sums: right answers after any number of corrections, a closed vocabulary, and a split without overlap."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.chains.questions import (
    CHAINS,
    LARGEST_RESULT,
    MISTAKES,
    STEPS,
    Chain,
    apply,
    draw_chain,
    draw_questions,
    solution,
    vocabulary,
)
from examples.quickstart.questions import Question, number_in_words
from examples.quickstart.spoken_sums import SynthesisConfig, synthesize
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.reward import answers_agree, extract_answer

NUMBERS = {number_in_words(n): n for n in range(LARGEST_RESULT + 1)}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return draw_questions(400, 0, held_out=False)


def test_every_answer_ends_rightly(questions: list[Question]) -> None:
    """Catches a mistake without a correction, a step from another value, and an answer that is not found."""
    for question in questions:
        words = question.text.split()[-(2 * STEPS + 1) :]
        value = NUMBERS[words[0]]
        operations = [(words[i], NUMBERS[words[i + 1]]) for i in range(1, len(words), 2)]
        *parts, last = question.solution.split(" . ")
        steps = [s for s, following in zip(parts, [*parts[1:], last], strict=True) if "no" not in (s, following)]
        assert len(steps) == STEPS
        for step, (operation, operand) in zip(steps, operations, strict=True):
            left, sign, right, _, result = step.split()
            assert (NUMBERS[left], sign, NUMBERS[right]) == (value, operation, operand)
            value = apply(value, operation, operand)  # type: ignore[arg-type]
            assert NUMBERS[result] == value
        answer = extract_answer(question.solution)
        assert answer is not None and answers_agree(answer, question.answer) and question.answer == str(value)


def test_mistakes_are_as_frequent_as_configured_and_really_wrong(questions: list[Question]) -> None:
    """Catches a teacher that is not soft, and a "no" after a right step."""
    mistakes = 0
    for question in questions:
        parts = question.solution.split(" . ")
        for i, part in enumerate(parts):
            if part == "no":
                mistakes += 1
                wrong, corrected = parts[i - 1].split(), parts[i + 1].split()
                assert (
                    wrong != corrected
                    and wrong[:2] == corrected[:2]
                    and all(word in NUMBERS for word in (wrong[2], wrong[4]))
                )
    assert mistakes / (STEPS * len(questions)) == pytest.approx(MISTAKES, abs=0.03)
    chain = Chain(5, (("plus", 3), ("minus", 2), ("plus", 1), ("plus", 1)))
    assert solution(chain, np.random.default_rng(0), mistakes=0.0) == (
        "five plus three is eight . eight minus two is six . six plus one is seven . seven plus one is eight "
        ". the answer is 8"
    )


def test_answers_are_long(questions: list[Question]) -> None:
    """Catches a task that has become as short as the quickstart's, or that max_new_tokens of its configuration cuts."""
    lengths = [len(question.solution.split()) + 1 for question in questions]
    assert min(lengths) > 28 and 30 < sum(lengths) / len(lengths) < 45 and max(lengths) <= 64


def test_nothing_held_out_is_trained_on() -> None:
    """Catches a chain in both sets, in any seed and phrasing, and a rule that holds out one beginning only."""
    train = {question.text.split()[-9:][0] for question in draw_questions(500, 0, held_out=False)}
    sets = [
        {" ".join(q.text.split()[-(2 * STEPS + 1) :]) for q in draw_questions(500, seed, held_out=held_out)}
        for seed, held_out in ((0, False), (1, False), (0, True))
    ]
    assert not (sets[0] | sets[1]) & sets[2] and sets[0] != sets[1] and len(sets[2]) == 500
    drawn = [draw_chain(np.random.default_rng(i)) for i in range(2000)]
    assert sum(chain.held_out for chain in drawn) / len(drawn) == pytest.approx(1 / 7, abs=0.03)
    assert len(Counter(chain.start for chain in drawn if chain.held_out)) == len(train) == 9


def test_the_vocabulary_is_closed(questions: list[Question]) -> None:
    """Catches a word that the word-level tokenizer lacks."""
    words = {
        word
        for q in [*questions, *draw_questions(200, 1, held_out=True)]
        for word in (*q.text.split(), *q.solution.split())
    }
    assert words <= set(vocabulary())


def test_the_same_for_the_same_seed() -> None:
    """Catches a draw from a global generator."""
    assert (
        draw_questions(20, 3, held_out=True)
        == draw_questions(20, 3, held_out=True)
        != draw_questions(20, 4, held_out=True)
    )


def test_spoken_as_a_task_of_their_own(tmp_path: Path) -> None:
    """Catches chains taken for sums, held-out chains in training, and utterances beyond the encoder's window."""
    made = {
        split: synthesize(SynthesisConfig(split, count=12, max_seconds=4.0), tmp_path / split, questions=CHAINS)
        for split in ("train", "heldout")
    }
    assert all(manifest.source["task"] == "chains" for manifest in made.values())
    spoken = {split: [ShardDataset(tmp_path / split)[i] for i in range(12)] for split in made}
    assert [s.question for s in spoken["heldout"]] == [q.text for q in draw_questions(12, 0, held_out=True)]
    assert all(
        s.solution and s.answer and s.solution.endswith(s.answer) for s in (*spoken["train"], *spoken["heldout"])
    )
    with pytest.raises(CordError, match="task = 'chains', not 'sums'"):
        synthesize(SynthesisConfig("train", count=12, max_seconds=4.0), tmp_path / "train")
