"""Choices and gold answers as sets write them: the layouts of ARC, MMLU, MedQA, MathQA, VoiceBench and others."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.choices import LETTERS, ChoicesError, lettered, read_choices, split_options


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        (["iron", "wood"], ("iron", "wood")),
        (["(A) Dog", "(B) Cat"], ("Dog", "Cat")),
        (["A. Vitamin A", "B. Vitamin B"], ("Vitamin A", "Vitamin B")),
        (["a) iron", "b) wood"], ("iron", "wood")),
        (["A. Milne", "B. Brecht", "J. Joyce"], ("A. Milne", "B. Brecht", "J. Joyce")),
        ([3, 4.5], ("3", "4.5")),
        ({"label": ["A", "B"], "text": ["iron", "wood"]}, ("iron", "wood")),
        ({"text": ["iron", "wood"], "label": ["1", "2"]}, ("iron", "wood")),
        ([{"label": "A", "text": "iron"}, {"label": "B", "text": "wood"}], ("iron", "wood")),
        ({"A": "iron", "B": "wood"}, ("iron", "wood")),
        ({"b": "wood", "a": "iron", "c": None}, ("iron", "wood")),
        ({"0": "iron", "1": "wood"}, ("iron", "wood")),
        ("A. iron B. wood", ("iron", "wood")),
        ("(A) iron\n(B) wood", ("iron", "wood")),
        ("a ) 38 , b ) 27.675 , c ) 30", ("38", "27.675", "30")),
    ],
)
def test_layouts(written: Any, texts: tuple[str, ...]) -> None:
    """Catches a layout that is refused, a letter read out twice, and initials taken for letters."""
    assert read_choices(written).texts == texts


def test_letters_are_read_out_once() -> None:
    """Catches "B. (B) Cat."."""
    assert lettered(read_choices(["(A) Dog", "(B) Cat"]).texts) == "A. Dog. B. Cat."


@pytest.mark.parametrize("written", ["iron", ["iron"], ["a", ""], [True, False], 7, {"A": "x", "C": "y"}, [["x"], "y"]])
def test_what_is_refused_is_shown(written: Any) -> None:
    """Catches a reason without the value that it is about, and a guess in place of a refusal."""
    with pytest.raises(ChoicesError) as refused:
        read_choices(written)
    assert repr(written)[:40] in str(refused.value)


@pytest.mark.parametrize(
    ("written", "gold", "letter"),
    [
        (["iron", "wood"], "B", "B"),
        (["iron", "wood"], "b", "B"),
        (["iron", "wood"], "(B)", "B"),
        (["iron", "wood"], "Wood", "B"),
        (["iron", "wood"], "B. wood", "B"),
        (["iron", "wood"], 1, "B"),
        (["iron", "wood"], 1.0, "B"),
        (["0", "4"], 1, "B"),
        (["3", "4"], 4, "B"),
        ([3, 4], 4, "B"),
        ({"label": ["1", "2"], "text": ["iron", "wood"]}, "2", "B"),
        (["an", "a"], "A", "A"),
    ],
)
def test_gold_answers(written: Any, gold: Any, letter: str) -> None:
    """Catches an index from 1, a number that is taken for an index, and a label that is taken for a text."""
    assert read_choices(written).letter_of(gold) == letter


@pytest.mark.parametrize(
    ("written", "gold", "reason"),
    [
        (["iron", "wood"], "glass", "'glass' is none of its choices, nor a letter up to B; they are ['iron', 'wood']"),
        (["iron", "wood"], 2, "answer 2 is neither an index from 0 to 1"),
        (["iron", "wood"], True, "True"),
        (["iron", "wood"], ["A"], "['A']"),
        (["iron", "iron"], "iron", "2 of its choices"),
        (["2", "1", "3"], 2, "an index and another choice's text"),
    ],
)
def test_doubtful_gold_answers_are_refused(written: Any, gold: Any, reason: str) -> None:
    """Catches one of two meanings taken silently."""
    with pytest.raises(ChoicesError) as refused:
        read_choices(written).letter_of(gold)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which? A. Vitamin A. B. Vitamin C.", ("Vitamin A", "Vitamin C")),
        (
            "Which cures scurvy? A. Vitamin A. B. Vitamin C. C. Vitamin D. D. Vitamin B.",
            ("Vitamin A", "Vitamin C", "Vitamin D", "Vitamin B"),
        ),
        ("Which is a metal? A. iron B. dry wood C. water D. air", ("iron", "dry wood", "water", "air")),
        ("Who was A. Einstein? A. a poet B. a cook", ("a poet", "a cook")),
        ("Pick.\nA) Plan B. C) is no option\nB) Plan A", ("Plan B. C) is no option", "Plan A")),
        ("Without options that can be told", ()),
        ("Only A. one", ()),
    ],
)
def test_options_are_cut_in_the_order_of_their_letters(text: str, options: tuple[str, ...]) -> None:
    """Catches a cut at a letter that belongs to an option's text."""
    assert split_options(text) == options


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["A", "label", "text"]),
    lambda v: (
        st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["A", "B", "label", "text", "0"]), v, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
@settings(max_examples=300, deadline=None)
def test_anything_is_read_or_refused(written: Any, gold: Any) -> None:
    """Catches another exception than the one that shows what it is about."""
    with suppress(ChoicesError):
        choices = read_choices(written)
        assert 2 <= len(choices.texts) <= 10 and choices.letter_of(gold) in LETTERS[: len(choices.texts)]
