"""The choice that a response decides on: responses as models write them, in their usual and unusual forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.reward import answers_agree, extract_answer

METALS = ("iron", "wood", "natural gas", "gas")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C) natural gas", "C"),
        ("**B** because wood burns", None),
        ("B) wood", "B"),
        ("The answer is D.", "D"),
        ("The answer is wood.", "B"),
        ("Let us see. The correct answer is (A), as iron is a metal.", "A"),
        (r"So \boxed{C}", "C"),
        ("I would go for option B, wood.", "B"),
        ("It is natural gas.", "C"),
        ("It is wood or iron.", None),
        ("A metal is hard, so it is iron", "A"),
        ("I think B is right", "B"),
        ("I do not know.", None),
        ("", None),
        ("The answer is unknown", None),
        ("Not (A). Definitely (B)", "B"),
        ("The answer is F", None),
    ],
)
def test_choices(response: str, letter: str | None) -> None:
    """Catches the article "A" or the word "I" taken for a choice, a text inside another, and a letter not offered."""
    expected = "B" if response.startswith("**B**") else letter
    assert extract_answer(response, choices=METALS) == expected


def test_choices_whose_texts_are_not_known() -> None:
    """Catches an empty text, which is in every response."""
    unknown = ("", "", "", "")
    assert extract_answer("It must be the second one", choices=unknown) is None
    assert extract_answer("D", choices=unknown) == "D"


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ("B", "wood", True),
        ("b", "(B)", True),
        ("B. wood", "Wood.", True),
        ("natural gas", "C", True),
        ("natural gas", "gas", False),
        ("iron or wood", "iron or wood", False),
        ("A", "B", False),
        ("F", "F", False),
        ("", "", False),
    ],
)
def test_answers_with_choices_agree_by_letter(a: str, b: str, agree: bool) -> None:
    """Catches a letter that does not agree with its choice's text, and two answers that name no choice."""
    assert answers_agree(a, b, choices=METALS) is agree and answers_agree(b, a, choices=METALS) is agree


def test_no_choices_is_a_free_answer() -> None:
    """Catches an empty list of choices that matches nothing."""
    assert extract_answer("the answer is 4", choices=()) == "4" and answers_agree("4", "four", choices=[])


@settings(max_examples=60, deadline=3000)
@given(st.text(max_size=60) | st.text("AB().:\\boxed{}# answeris\n", max_size=100))
def test_any_text_has_a_choice_or_none(response: str) -> None:
    """Catches an exception or a hang on any text."""
    assert extract_answer(response, choices=METALS) in {None, "A", "B", "C", "D"}
