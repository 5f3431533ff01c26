"""Final answers found in what models write, and compared by meaning."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.reward import answers_agree, extract_answer
from megatron_cord.reward.patience import within

FOUND = [
    ("seven plus five is twelve . the answer is 12", "12"),
    ("The answer is 3.5.", "3.5"),
    ("The final answer is: **1,000** .", "1,000"),
    ("First 3, so Answer: twenty four. Then I checked 7 times.", "twenty four"),
    ("the answer is 4 . no , the answer is 5", "5"),
    ("The answer is (B).", "(B)"),
    ("The answer is -7", "-7"),
    (r"Hence \boxed{\frac{1}{2}}. The answer is 3.", r"\frac{1}{2}"),
    (r"\boxed{1} and later \boxed{x^{2}+1}", "x^{2}+1"),
    ("48/2 = 24 clips.\n48 + 24 = 72\n#### 72", "72"),
    ("It takes 5 hours and then 1,250 more", "1,250"),
    ("we get 3-4 apples", "4"),
    ("that leaves -4", "-4"),
    ("so x = - 4", "- 4"),
    ("about 12.5%", "12.5%"),
    ("all in all that is one hundred and five", "one hundred and five"),
    (r"the ratio \frac{3}{4}", r"\frac{3}{4}"),
    ("I would pick option C", "C"),
    ("Surely (D) as (A) is wrong , so (D)", "D"),
    ("b", "b"),
    ("I do not know", None),
    ("", None),
    ("the answer is", None),
    (r"\boxed{", None),
    ("####", None),
]

AGREE = [
    ("1,000", "1000"),
    ("0.50", "1/2"),
    (r"\frac{1}{2}", ".5"),
    (r"\dfrac{-3}{4}", "-0.75"),
    ("$18", "18.00"),
    ("twelve", "12"),
    ("twenty-four", "twenty four"),
    ("one hundred and five", "105"),
    ("two thousand three hundred", "2,300"),
    ("minus seven", "-7"),
    ("- 7", "-7"),
    ("zero", "0"),
    ("1 1/2", "1.5"),
    ("50%", r"50\%"),
    ("50 percent", "0.5"),
    ("50%", "50"),
    ("12 apples", "twelve"),
    ("1 apple", "one apples"),
    ("(B)", "b"),
    ("B. Paris", "(B)"),
    ("Paris.", "paris"),
    ("x+1", "1+x"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("2^{3}", "8"),
    ("(1, 2)", "(1,2)"),
]

DISAGREE = [
    ("12", "13"),
    ("12", "-12"),
    ("1,000", "1.000"),
    ("1/2", "1/3"),
    ("one two", "12"),
    ("twenty zero", "20"),
    ("5 apples", "5 pears"),
    ("5%", "0.5"),
    ("50%", "5000"),
    ("A", "B"),
    ("(B)", "2"),
    ("Paris", "London"),
    ("x+1", "x+2"),
    ("1/0", "1/0 apples"),
    ("12", ""),
    ("", ""),
    ("nine hundred", "nine"),
]


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    """Catches a full stop kept, a decimal point cut, a range read as a minus, and a first answer before the last."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(("first", "second"), AGREE)
def test_the_same_in_another_notation(first: str, second: str) -> None:
    """Catches rewards lost to notation."""
    assert answers_agree(first, second) and answers_agree(second, first)


@pytest.mark.parametrize(("first", "second"), DISAGREE)
def test_another_answer(first: str, second: str) -> None:
    """Catches rewards given to wrong answers."""
    assert not answers_agree(first, second) and not answers_agree(second, first)


@pytest.mark.parametrize(
    "junk",
    [
        "9^9^9^9^9",
        "9**9**9**9",
        "(10^9)!",
        "2^{99999999}",
        r"\sum_{i=1}^{10^9} i",
        "((((((((((",
        "9" * 5000,
        "1e999999999",
        "\\" * 190,
        "1/" * 90 + "1",
    ],
)
def test_junk_neither_hangs_nor_crashes(junk: str) -> None:
    """Catches expressions handed to sympy that it would compute for hours."""
    assert isinstance(extract_answer(f"the answer is {junk}"), str | None)
    assert answers_agree(junk, "12") is False
    assert extract_answer("ab " * 100_000 + junk[:20] + " 7") is not None


def test_slow_algebra_is_given_up() -> None:
    """Catches a comparison that expands a large power for minutes, and the thread it would leave behind."""
    before = set(threading.enumerate())
    assert answers_agree("(x+y+z+w)^{99}", "12") is False
    assert_ended(set(threading.enumerate()) - before)


def test_a_lost_interruption_is_repeated() -> None:
    """Catches a thread that computes for ever because its interruption hit a finalizer or the garbage collector."""

    def compute() -> None:
        while True:
            sum(range(100))

    def lose_one() -> int:
        with suppress(BaseException):
            compute()
        compute()
        return 1

    before = set(threading.enumerate())
    assert within(1.0, lose_one, otherwise=7) == 7
    assert_ended(set(threading.enumerate()) - before)


def assert_ended(threads: set[threading.Thread]) -> None:
    """On a busy machine they may end a little later."""
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


ALPHABET = st.sampled_from(
    [
        *"0123456789.,-+/*^(){}[]%$\\=! abx\n",
        "\\frac{",
        "\\sqrt{",
        "\\boxed{",
        "#### ",
        "twenty ",
        "and ",
        "the answer is ",
    ]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(ALPHABET, max_size=25).map("".join), st.lists(ALPHABET, max_size=12).map("".join))
def test_anything_a_model_may_babble(first: str, second: str) -> None:
    """Catches an exception on some odd mixture of digits, LaTeX and words, and a relation that is not symmetric."""
    for text in (first, second):
        answer = extract_answer(text)
        assert answer is None or 0 < len(answer) <= 200
    assert answers_agree(first, second) == answers_agree(second, first)


@given(st.integers(0, 10**9 - 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_numbers_agree_with_their_words_and_commas(number: int) -> None:
    """Catches a mistake in the arithmetic of number words, against a speller that shares no code with the parser."""
    assert answers_agree(spell(number), f"{number:,}")
    assert not answers_agree(spell(number), str(number + 1))
    assert extract_answer(f"in the end there were {spell(number)}") == spell(number)


def spell(number: int) -> str:
    """Return English words for 0 ≤ number < 10^9."""
    small = (
        "zero one two three four five six seven eight nine ten "
        "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    )
    tens = "twenty thirty forty fifty sixty seventy eighty ninety"
    for size, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if number >= size:
            joint = " and " if size == 100 else " "
            return f"{spell(number // size)} {name}" + (joint + spell(number % size) if number % size else "")
    if number >= 20:
        return tens.split()[number // 10 - 2] + (f"-{spell(number % 10)}" if number % 10 else "")
    return small.split()[number]
