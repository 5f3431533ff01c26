"""Text for a voice: words for every number and symbol, or a refusal with its reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cord.data.number_words import cardinal, ordinal
from megatron_cord.reward.numbers import parse_quantity
from megatron_cord.speech import UnspeakableError, verbalize


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        (r"What is $\frac{1}{2}$ of $10?", "What is one half of ten dollars?"),
        ("What is 3/4 + 1/8?", "What is three quarters plus one eighth?"),
        ("Solve $x^2 + 3x = 10$.", "Solve x squared plus three x equals ten."),
        ("It costs $5.50 or $1,200.", "It costs five dollars and fifty cents or one thousand two hundred dollars."),
        ("50% of 1,234.5", "fifty percent of one thousand two hundred thirty four point five"),
        ("the 21st of May, -5 + 3", "the twenty first of May, minus five plus three"),
        (r"$\sqrt[3]{27}$ and $x_1$", "the cube root of twenty seven and x sub one"),
        (r"$\frac{x+1}{y}$ at $90^\circ$", "x plus one over y at ninety degrees"),
        ("He said “hi” to 2 1/2 well-known cats", "He said hi to two and one half well-known cats"),
        ("$3 million\n- pages 3-5", "three million dollars pages three to five"),
        ("Fill in ____ and 7", "Fill in blank and seven"),
    ],
)
def test_symbols_become_words(written: str, spoken: str) -> None:
    """Would catch a symbol that is dropped, read wrongly, or left for the synthesizer to guess."""
    assert verbalize(written) == spoken


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("Run ```print(1)```", "code"),
        ("| a | b |", "table"),
        ("See https://example.org", "address"),
        ("![a cat](cat.png) what is it?", "picture"),
        (r"\begin{align} x \end{align}", "environment"),
        (r"$\foo{x}$", r"\\foo"),
        ("Что это?", "another script"),
        ("born 1/2/2020", "date"),
        ("a → b", "rightwards arrow"),
        ("?!", "no words"),
        ("word " * 500, "2500 characters"),
    ],
)
def test_what_cannot_be_spoken_is_refused(written: str, reason: str) -> None:
    """Would catch code that is spoken, or a refusal without a reason."""
    with pytest.raises(UnspeakableError, match=reason):
        verbalize(written)


@given(st.text(alphabet="abc XY12.,/-$%^{}\\_()frac+=é×½\n", max_size=80))
def test_never_fails_otherwise(text: str) -> None:
    """Would catch a crash, a hang, or a digit or symbol that reaches the synthesizer."""
    try:
        spoken = verbalize(text)
    except UnspeakableError:
        return
    assert not re.search(r"[\d$%^{}\\/=+_×½]", spoken)


@given(st.integers(0, 10**12 - 1))
def test_numbers_are_read_back(number: int) -> None:
    """Would catch a wrong word: the words must be parsed as the same number."""
    quantity = parse_quantity(cardinal(number))
    assert quantity is not None and quantity.value == number


def test_ordinals() -> None:
    """Would catch "twoth" and "twentyth"."""
    assert [ordinal(n) for n in (1, 2, 12, 20, 23, 100)] == [
        "first",
        "second",
        "twelfth",
        "twentieth",
        "twenty third",
        "one hundredth",
    ]
