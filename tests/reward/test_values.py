"""Answers by kind: what has the same value agrees, and nothing is valued by a part of it."""

from __future__ import annotations

import time
from datetime import date
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.number_words import cardinal, ordinal
from megatron_cord.reward import answers_agree, extract_answer
from megatron_cord.reward.moments import CalendarDate, parse_date, parse_time
from megatron_cord.reward.numbers import parse_quantity

SAME = {
    "mixed numbers": ["2.5", r"2\frac{1}{2}", r"2 \frac12", r"2\dfrac{1}{2}", "2 1/2", "2½", "2 ½", "5/2", "2 1⁄2"],
    "mixed numbers in words": ["2.5", "two and a half", "two and one half", "2 and a half", "two-and-a-half"],
    "with a unit": ["2.5", "2 1/2 cups", "2½ cups", "two and a half cups", "2.5 cups"],
    "negative": ["-2.5", "−2½", "–2.5", "minus two and a half", "- 2 1/2", r"-\frac{5}{2}", "negative 2.5"],
    "thousands": ["7000", "7,000", "7 thousand", "seven thousand", "7e3", "7.0 thousand"],
    "millions": ["1200000", "1.2 million", "one point two million", "1,200,000", r"1.2\times 10^6"],
    "halves of a million": ["2500000", "two and a half million", "2.5 million", "2 1/2 million"],
    "trillions": ["two trillion and five", "2,000,000,000,005"],
    "dozens": ["36", "3 dozen", "three dozen", "36 eggs"],
    "half a dozen": ["6", "half a dozen", "six"],
    "decimals in words": ["0.75", "zero point seven five", "three quarters", "three-fourths", "3/4", "¾", "75%"],
    "thirds": ["1/3", "one third", "a third", "one-third", r"\frac{1}{3}", "⅓"],
    "over": ["3/500", "three over five hundred"],
    "places": ["21st", "twenty first", "twenty-first", "the 21st"],
    "half an hour": ["0.5 hours", "half an hour", "1/2 hour", "30 minutes"],
    "three quarters of a cup": ["three quarters of a cup", "3/4 cup", "3/4 of a cup", "0.75 cups"],
    "codes": ["USD 5", "$5", "5 USD", "US$5"],
    "euros": ["€5", "5 euros", "5€", "5 EUR", "five euros"],
    "dollars": [
        "$5.50",
        "5.50 dollars",
        "5 dollars and 50 cents",
        "five dollars and fifty cents",
        "550 cents",
        r"\$5.5",
    ],
    "large money": ["$1.2M", "$1.2 million", "1.2 million dollars", "$1,200,000"],
    "pounds": ["£5", "5 pounds", "five pounds"],
    "per hour": ["$10 per hour", "$10 an hour", "10 dollars per hour", "10 dollars/hour"],
    "durations": ["2.5 hours", "2 hours and 30 minutes", "2 hours 30 minutes", "150 minutes", "2 h, 30 min"],
    "lengths": ["5 feet 3 inches", "63 inches", "5.25 ft"],
    "spelled units": ["5 km", "5km", "5 kilometers", "5 kilometres"],
    "areas": ["5 m²", "5 m^2", "5 square meters", "5 sq m", "5 square metre"],
    "temperatures": ["-5 °C", "−5°C", "-5 degrees Celsius", "minus five degrees celsius"],
    "percentages": ["50%", r"50\%", "50 percent", "fifty per cent", "50 %"],
    "evening": [
        "21:15",
        "9:15 pm",
        "9:15 p.m.",
        "9:15PM",
        "quarter past nine pm",
        "nine fifteen p.m.",
        "9:15 at night",
    ],
    "morning": ["9:15 am", "9:15", "09:15", "9:15 a.m.", "a quarter past nine", "9:15 in the morning", "nine fifteen"],
    "half past": ["9:30", "half past nine", "half past 9", "nine thirty", "30 minutes past nine"],
    "quarter to": ["9:45", "quarter to ten", "a quarter to 10", "15 minutes before ten"],
    "o'clock": ["9:00", "9 o'clock", "nine o'clock", "9 am", "nine a.m."],
    "noon": ["12:00", "noon", "12 pm", "twelve noon", "12 p.m."],
    "midnight": ["0:00", "midnight", "12 am", "12:00 a.m."],
    "dates": ["July 4, 1776", "4 July 1776", "July 4th, 1776", "1776-07-04", "7/4/1776", "4.7.1776", "Jul. 4, 1776"],
    "dates in words": [
        "7/4/1776",
        "the 4th of July, 1776",
        "July fourth, seventeen seventy six",
        "Thursday, July 4, 1776",
    ],
    "unambiguous dates": ["December 25, 2020", "25/12/2020", "12/25/2020", "25.12.2020", "2020/12/25", "25-Dec-2020"],
    "days of a year": ["December 25", "25 December", "Dec 25th", "the twenty fifth of December", "25th of December"],
    "months": ["March 2020", "March, 2020", "Mar 2020", "March of 2020"],
    "ratios": ["ratio of 2 to 4", "1:2", "the ratio is 2:4", "odds of 1:2", "1 : 2", "2:4"],
    "years in words": ["1945", "nineteen forty five", "nineteen forty-five"],
    "years after 2000": ["2020", "twenty twenty", "two thousand and twenty"],
    "times in words": ["19:45", "nineteen forty five", "7:45 pm"],
    "powers of ten": ["1500000", "1.5e6", "one point five times ten to the power of six", r"1.5 \cdot 10^{6}"],
    "degrees": ["90°", "ninety degrees", r"90^\circ"],
    "inches": ["5 ft 3 in", "five feet three inches"],
    "expressions": ["2√3", r"2\sqrt{3}", r"\sqrt{12}", "√12"],
    "products": ["2(3)", "6", "six"],
    "powers": ["2^{3}", "8", "eight", "2³"],
    "words in LaTeX": [r"\text{Paris}", "Paris", "paris.", "**Paris**", r"$\text{Paris}$"],
}

DIFFERENT = [
    (r"2\frac{1}{2}", "10.5"),
    ("7 thousand", "7"),
    ("7 thousand", "7 million"),
    ("one third", "1"),
    ("one third", "3"),
    ("3y", "3"),
    ("3 xy", "3"),
    ("5M", "5"),
    ("2n", "2"),
    ("5k", "5"),
    ("5 factorial", "5"),
    ("2 pi", "2"),
    ("four or five", "4"),
    ("four or five", "5"),
    ("4 or 5", "4"),
    ("5 and a half", "5"),
    ("5 dollars and 50 cents", "5"),
    ("5 feet 3 inches", "5"),
    ("3 million two", "3"),
    ("5 to 6", "5"),
    ("5 less than x", "5"),
    ("5 squared", "5"),
    ("5 percent of 10", "5"),
    ("5 of 10", "5"),
    ("twice 5", "5"),
    ("1.5.2", "1.5"),
    ("2 thousandths", "2"),
    ("one hundred twenty fifths", "4"),  # of two readings: 120/5 and 100/25
    ("3–5", "-2"),
    ("2√3", "2"),
    ("3 4", "7"),
    ("10²", "102"),
    ("2½", "21/2"),
    ("$5", "€5"),
    ("5 pounds", "5 kg"),
    ("9:15 am", "9:15 pm"),
    ("9:15", "0.6"),
    ("9:15", "9.25"),
    ("10:20", "20:40"),
    ("noon", "midnight"),
    ("9 am", "9 pm"),
    ("July 4", "July 5"),
    ("July 4, 1776", "July 4, 1777"),
    ("Monday, July 4, 1776", "July 4, 1776"),  # it was a Thursday
    ("2020-12-25", "1983"),
    ("2:4", "0.5"),
    ("1:2", "2:1"),
    ("3 to 5", "6 to 10"),
    ("−5", "5"),
    ("–5 degrees", "5 degrees"),
    ("J. K. Rowling", "J. R. R. Tolkien"),
    ("A. Einstein", "A. Lincoln"),
    ("C", "C++"),
    ("third", "1/3"),
    (".", "!"),
    ("9" * 300, "9" * 250),
]


@pytest.mark.parametrize("kind", SAME)
def test_one_value_in_any_spelling(kind: str) -> None:
    """Catches a spelling whose value is another's, or a part's, and a relation that is not an equivalence."""
    for a, b in permutations(SAME[kind], 2):
        assert answers_agree(a, b), f"{a!r} ≁ {b!r}"


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_other_values(a: str, b: str) -> None:
    """Catches a value that is taken from a part of an answer, and two kinds that are compared as numbers."""
    assert not answers_agree(a, b) and not answers_agree(b, a)
    assert answers_agree(a, a) and answers_agree(b, b)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is −5 degrees", "−5"),
        ("So it is –5", "–5"),
        ("That makes 2 1/2 cups.", "2 1/2"),
        ("We need 2½ cups", "2½"),
        (r"that is 2\frac{1}{2} cups", r"2\frac{1}{2}"),
        ("It costs $1.2 million in total.", "$1.2 million"),
        ("So 7 thousand people came", "7 thousand"),
        ("It is four or five", "four or five"),
        ("So it is 3y", "3y"),
        ("They got 3 quarters", "3 quarters"),
        ("H2O has two atoms", "two"),
        ("He pays 5 dollars and 50 cents.", "5 dollars and 50 cents"),
        ("It took 2 hours and 30 minutes", "2 hours and 30 minutes"),
        ("He has 10 dollars, 5 euros", "5 euros"),
        ("x is 5 and y is 3", "3"),
        ("it is twenty zero", "twenty zero"),
        ("two-thirds of them", "two-thirds"),
        ("It starts at 9:15 pm", "9:15 pm"),
        ("the ratio is 10:20", "ratio is 10:20"),
        ("He was born on July 4, 1776 in a town", "July 4, 1776"),
        ("It was 12/25/2020", "12/25/2020"),
        ("Items:\n- 5 apples\n- 7 pears", "7"),
        ("The answer is 9:15 p.m. Then they left", "9:15 p.m"),
        ("The answer is J. K. Rowling. She wrote it.", "J. K. Rowling"),
        ("The answer is St. Louis. Yes", "St. Louis"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is approximately 3.14.", "3.14"),
        ("**Answer:** 5", "5"),
        ("<answer>42</answer>", "42"),
        ("So the total is $5$.", "5"),
        ("This is version 1.2.3", None),
    ],
)
def test_a_value_is_found_whole(response: str, answer: str | None) -> None:
    """Catches an answer that is cut out of the number, name, range or time that it is a part of."""
    assert extract_answer(response) == answer


# What the product speaks reads back to what it spoke.
@given(st.integers(0, 10**15 - 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_spoken_numbers_read_back(number: int) -> None:
    """Catches a number whose words the reader takes for another, or for none."""
    assert (read := parse_quantity(cardinal(number))) and read.value == number
    assert (place := parse_quantity(ordinal(number % 10**6 + 3))) and place.value == number % 10**6 + 3
    decimals = " ".join(cardinal(int(digit)) for digit in str(number % 997))
    spoken = parse_quantity(f"minus {cardinal(number)} point {decimals}")
    assert spoken and spoken.value == -Fraction(f"{number}.{number % 997}")


@given(st.integers(1, 99), st.integers(2, 20), st.integers(0, 500))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_spoken_fractions_read_back(above: int, below: int, whole: int) -> None:
    """Catches "two and one third" read as 7, 2 or 201/3."""
    name = {2: "half" if above == 1 else "halves", 4: "quarter" if above == 1 else "quarters"}.get(
        below, ordinal(below) + "s" * (above != 1)
    )
    read = parse_quantity(f"{cardinal(above)} {name}")
    assert read and read.value == Fraction(above, below)
    if above < below:
        read = parse_quantity(f"{cardinal(whole)} and {cardinal(above)} {name}")
        assert read and read.value == whole + Fraction(above, below)


@given(st.dates(date(1000, 1, 1), date(2999, 12, 31)))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_dates_read_back(day: date) -> None:
    """Catches a month and a day exchanged, and a date taken for a number."""
    expected = CalendarDate(day.year, day.month, day.day)
    month = f"{day:%B}"
    for spelled in (
        day.isoformat(), f"{day:%B} {day.day}, {day.year}", f"{day.day} {day:%b} {day.year}", f"{day:%m/%d/%Y}",
        f"{day:%d.%m.%Y}", f"the {ordinal(day.day)} of {day:%B} {day.year}", f"{day:%A}, {month} {day.day}, {day.year}",
    ):  # fmt: skip
        assert parse_date(spelled) == expected, spelled


@given(st.times())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_times_read_back(moment: object) -> None:
    """Catches 12 at noon and at midnight exchanged, and the halves of the day."""
    clock, spoken = f"{moment:%H:%M}", f"{moment:%I:%M %p}"
    assert parse_time(clock) == parse_time(spoken) == parse_time(spoken.lower().replace("m", ".m.")) is not None


def spelled(value: Fraction) -> st.SearchStrategy[str]:
    """Spell a number in one of the ways of the rules."""
    ways = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    whole, part = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    if part and whole:
        ways += [f"{sign}{whole} {part}", f"{sign}{whole} {part} cups", f"{sign}{whole} and {part}"]
    if not part:
        ways += [
            f"{sign}{whole:,}",
            f"{'minus ' * (value < 0)}{cardinal(int(whole))}",
            f"{sign}{whole} cups",
            f"−{whole}",
        ]
        ways = ways if value < 0 else ways[:-1]
    return st.sampled_from(ways)


VALUES = st.builds(Fraction, st.integers(-3000, 3000), st.integers(1, 12))


@given(st.data(), VALUES, VALUES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_agreement_is_an_equivalence(data: st.DataObject, first: Fraction, second: Fraction) -> None:
    """Catches a spelling that agrees with another value, or with one of its own spellings but not the next."""
    a, b, c = (data.draw(spelled(first)) for _ in range(3))
    assert answers_agree(a, a) and answers_agree(a, b) and answers_agree(b, a)
    assert answers_agree(b, c) and answers_agree(a, c)
    other = data.draw(spelled(second))
    assert answers_agree(a, other) is answers_agree(other, a) is (first == second)


PIECES = st.sampled_from(
    [
        *("0123456789.,:-–−+/^*(){}[]%$€£½²√π\\ \n|'\"!?;xyB٣１𝟗\0é…"),
        *(
            [
                " and ",
                " or ",
                " to ",
                "half ",
                "third ",
                "dozen ",
                "point ",
                "a ",
                "one ",
                "twenty",
                "-five ",
                "hundred ",
                "million ",
                "am ",
                "pm",
                "July ",
                "of ",
            ]
        ),
        *(
            [
                "past ",
                "ratio ",
                "\\frac{",
                "\\text{",
                "\\boxed{",
                "answer is ",
                "<answer>",
                "</answer>",
                "####",
                "cm ",
                "dollars ",
                "cents ",
                "not ",
            ]
        ),
        *(["A ", "(C)", "option ", "because "]),
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_two_texts(first: str, second: str) -> None:
    """Catches an exception, a relation that is not symmetric, and an answer that does not agree with itself."""
    choices = ("iron", "5", "1/2", second)
    for text in (first, second):
        answer = extract_answer(text)
        assert answer is None or 0 < len(answer) <= 200
        assert answers_agree(text, text) is bool(text.strip())
        assert extract_answer(text, choices=choices) in {None, "A", "B", "C", "D"}
    assert answers_agree(first, second) is answers_agree(second, first)
    assert answers_agree(first, second, choices=choices) is answers_agree(second, first, choices=choices)


@pytest.mark.parametrize(
    "piece",
    [
        "1 ",
        "a ",
        "one ",
        "and ",
        "5 or ",
        "$",
        "\\frac{1}{",
        "(B) ",
        "answer is ",
        "not A, ",
        "1:",
        ".",
        " ",
        "\n",
        "- ",
        "½",
        "9:15 pm ",
        "July 4, ",
        "hundred ",
        "-",
        "A. ",
        "x=",
        "{",
        "*",
        "5 dollars and ",
        "twenty-",
        "1/",
        "B or ",
        "option ",
        "b) ",
        "¼ ",
        "¢",
        "\\text{",
    ],
)
def test_long_texts_take_no_time(piece: str) -> None:
    """Catches a pattern that tries every pair of places in a text."""
    text = piece * (20_000 // len(piece))
    begun = time.process_time()
    extract_answer(text)
    extract_answer(text, choices=("iron", "wood", piece))
    answers_agree(text, text[:-1])
    answers_agree(text[:200], text[:199], choices=("iron", piece))
    assert time.process_time() - begun < 4
