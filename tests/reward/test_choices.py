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


GASES = ("oxygen", "helium", "argon", "neon")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is B because wood burns", "B"),
        ("option B", "B"),
        ("option b", "B"),
        ("b) wood", "B"),
        ("B - wood", "B"),
        ("B – wood", "B"),
        ("B: wood", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{B. wood}", "B"),
        (r"The answer is $\boxed{\textbf{(B)}}$.", "B"),
        ("**B**, wood", "B"),
        ("**Answer: B**", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>\nwood\n</answer>", "B"),
        ("The answer is b.", "B"),
        ("The best answer is B as wood burns", "B"),
        ("The correct option is B", "B"),
        ("The answer is wood (B).", "B"),
        ("The answer is (B) wood, not (A) iron.", "B"),
        ("A is right", "A"),
        ("It's A.", "A"),
        ("B, not C", "B"),
        ("A, B and C are wrong. So D.", "D"),
        ("It can't be A or B or D, so C", "C"),
        ("None of A, B, C; hence D", "D"),
        ("B or C? I'd say C.", "C"),
        ("D is wrong. C is wrong. B", "B"),
        ("Wood is not a metal; iron is.", "A"),
        ("B\n\nWood burns, and C would be a gas.", "B"),
        ("I pick A over B", "A"),
        ("I prefer (C) over (B)", "C"),
        ("C or D", None),
        ("The answer is C or D.", None),
        ("B/C", None),
        ("Both A and B", None),
        ("E or B", None),
        ("The answer is not B", None),
        ("The answer is not wood", None),
        ("Option A is wrong", None),
        ("It is not wood.", None),
        ("e.g. wood or iron", None),
        ("I. K. Brown", None),
    ],
)
def test_a_choice_with_its_reason(response: str, letter: str | None) -> None:
    """Catches a letter that is lost beside its reason or emphasis, and one that is named to be rejected."""
    assert extract_answer(response, choices=METALS) == letter
    assert letter is None or answers_agree(letter, METALS["ABCD".index(letter)], choices=METALS)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The right choice is a noble gas. Helium it is.", "B"),
        ("The correct choice is a gas which is inert. So neon.", "D"),
        ("A noble gas, helium", "B"),
        ("The answer is a", "A"),
        ("The answer is a noble gas: argon", "C"),
    ],
)
def test_the_article_is_no_choice(response: str, letter: str) -> None:
    """Catches "a" and "A" before a noun taken for the first choice."""
    assert extract_answer(response, choices=GASES) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("5", "A"), ("five", "A"), ("The answer is -5", "B"), ("So it is −5.", "B"), ("0.5", "D"), ("so one half", "D"),
        ("It is 1.5", "C"), ("15", None), ("2.5", None), ("B", "B"), (r"\boxed{\frac{1}{2}}", "D"),
    ],
)  # fmt: skip
def test_choices_that_are_numbers(response: str, letter: str | None) -> None:
    """Catches "5" found in "1.5" and "-5", and a number written in another way than its choice."""
    assert extract_answer(response, choices=("5", "-5", "1.5", "1/2")) == letter


@pytest.mark.parametrize(
    ("response", "letter"), [("x+1", "A"), ("It is x-1.", "B"), ("So 2*x", "C"), ("2 * x", "C"), ("x", None)]
)
def test_choices_that_are_expressions(response: str, letter: str | None) -> None:
    """Catches signs dropped from a choice's text, so that "x-1" is "x+1"."""
    assert extract_answer(response, choices=("x+1", "x-1", "2*x", "2/x")) == letter


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from("ABCD"),
    st.sampled_from(
        ["{}", "({})", "{}.", "**{}**", "Option {}", "The answer is {}.", r"\boxed{{\text{{{}}}}}", "#### {}"]
    ),
    st.sampled_from(["", " because it burns", "\nIt is a guess.", ", as I said"]),
)
def test_any_form_names_its_letter(letter: str, form: str, reason: str) -> None:
    """Catches a form that works for some letters or without a reason only."""
    assert extract_answer(form.format(letter) + reason, choices=METALS) == letter
