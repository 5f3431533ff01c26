"""The quickstart's questions: right answers, a closed vocabulary, a split without overlap."""

from __future__ import annotations

import pytest

from examples.quickstart.questions import (
    all_problems,
    draw_questions,
    heldout_questions,
    number_in_words,
    questions_about,
    split_problems,
    training_questions,
    vocabulary,
)
from megatron_cord.data.ordering.order import permutation
from megatron_cord.errors import CordError

WORDS = {number_in_words(n): n for n in range(40)}


def test_every_solution_is_true() -> None:
    """Would catch a wrong result, operands swapped in a solution, or an answer that is not the solution's last word."""
    for question in questions_about(all_problems()):
        equation, final = question.solution.split(" . ")
        left, right = equation.split(" is ")
        a, operation, b = left.split(" ")
        expected = WORDS[a] + WORDS[b] if operation == "plus" else WORDS[a] - WORDS[b]
        assert WORDS[right] == expected
        assert final == f"the answer is {expected}" and question.answer == str(expected)


def test_phrasings_say_the_operands_in_the_right_order() -> None:
    """Would catch "take nine from three" for nine minus three."""
    texts = {question.id: question.text for question in questions_about(all_problems())}
    assert texts["minus-9-3-1"] == "take three from nine"
    assert texts["minus-9-1-2"] == "nine apples minus one apple"
    assert texts["plus-7-5-2"] == "seven apples plus five apples"


def test_vocabulary_is_closed_and_fixed() -> None:
    """Would catch a word that the tokenizer lacks, and an order that depends on hashing."""
    words = vocabulary()
    assert words == sorted(set(words)) and len(words) == 71
    for question in questions_about(all_problems()):
        assert set((question.text + " " + question.solution).split(" ")) <= set(words)


def test_split_is_by_problem() -> None:
    """Would catch a held-out problem that is in training, in any phrasing."""
    split = split_problems(seed=3)
    assert not set(split.train) & set(split.held_out)
    assert set(split.train) | set(split.held_out) == set(all_problems())
    assert len(split.held_out) == 58
    assert {problem.operation for problem in split.held_out} == {"plus", "minus"}
    trained = {question.text for question in training_questions(2000, seed=0, split_seed=3)}
    evaluated = {question.text for question in heldout_questions(400, seed=0, split_seed=3)}
    assert not trained & evaluated


def test_split_and_order_are_pinned() -> None:
    """Would catch a shuffle that changes with the version of numpy or Python: held-out problems would leak."""
    assert permutation(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]
    assert [question.id for question in heldout_questions(3, seed=0)] == ["plus-1-12-3", "plus-14-15-0", "minus-12-1-2"]


def test_no_question_twice_before_all_came_once() -> None:
    """Would catch sampling with replacement, which leaves problems out."""
    drawn = training_questions(2672, seed=5)
    assert len({question.id for question in drawn[:1336]}) == 1336
    assert [question.id for question in drawn[:1336]] != [question.id for question in drawn[1336:]]
    assert drawn == training_questions(2672, seed=5) != training_questions(2672, seed=6)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_impossible_split_is_refused(fraction: float) -> None:
    """Would catch an empty side, which would only show as a crash in training or evaluation."""
    with pytest.raises(CordError, match="held_out_fraction"):
        split_problems(held_out_fraction=fraction)


def test_nothing_to_draw_from_is_refused() -> None:
    """Would catch an endless loop or an empty set when a fraction leaves no problems."""
    split = split_problems(held_out_fraction=0.001)
    assert split.held_out == ()
    with pytest.raises(CordError, match="no problems"):
        draw_questions(split.held_out, 4, seed=0)
