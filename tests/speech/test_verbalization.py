"""Text for a voice: what is said is what is asked, or it is refused with its reason."""

from __future__ import annotations

import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.chains.questions import CHAINS
from examples.quickstart.questions import all_problems, questions_about
from megatron_cord.data.number_words import cardinal, ordinal
from megatron_cord.errors import CordError
from megatron_cord.reward import answers_agree
from megatron_cord.speech import UnspeakableError, verbalize
from megatron_cord.speech.verbalization import normaliser
from tests.speech.spoken_mathematics import value_of

_MATHEMATICS = [
    ("What is 12-7?", "What is twelve minus seven?"),
    ("12-7", "twelve minus seven"),
    ("12–7 = ?", "twelve minus seven equals what?"),
    ("Solve x-3=5", "Solve x minus three equals five"),
    ("What is -5 - -3?", "What is minus five minus minus three?"),
    ("2**10", "two to the power of ten"),
    ("2^-3 + 5^2", "two to the power of minus three plus five squared"),
    (
        "x² + y³ - 2^(n+1)",
        "x squared plus y cubed minus two to the power of open parenthesis n plus one close parenthesis",
    ),
    ("2^3^4", "two to the power of three to the power of four"),
    ("(3+4)*2", "open parenthesis three plus four close parenthesis times two"),
    ("5 + (-3)", "five plus minus three"),
    ("f(x) = 3", "f of x equals three"),
    ("What is 3 x 4?", "What is three times four?"),
    ("a 3x4 grid", "a three by four grid"),
    ("What is 3/4 + 1/8?", "What is three quarters plus one eighth?"),
    ("2 1/2 - ½", "two and one half minus one half"),
    ("21/100 and 12/4", "twenty one over one hundred and twelve over four"),
    ("5! = 120", "five factorial equals one hundred twenty"),
    ("5 + ? = 8", "five plus what equals eight"),
    ("1.5e-3", "one point five times ten to the power of minus three"),
    ("0.50 and .5 and 007", "zero point five zero and zero point five and zero zero seven"),
    ("3 <= x != 5", "three is at most x is not equal to five"),
    ("50% of 1,234.5", "fifty percent of one thousand two hundred thirty four point five"),
    ("2πr", "two pi r"),
    ("If a = 5, what is a-b?", "If a equals five, what is a minus b?"),
    ("What is (12-7)?", "What is twelve minus seven?"),
    ("12\n+ 5\n+ 3", "twelve plus five plus three"),
    ("7 × 8 = □", "seven times eight equals blank"),
]
_LATEX = [
    (r"What is $\frac{1}{2}$ of $10?", "What is one half of ten dollars?"),
    ("Solve $x^2 + 3x = 10$.", "Solve x squared plus three x equals ten."),
    ("$12-7$", "twelve minus seven"),
    (r"$\sqrt[3]{27}$ and $x_1$", "the cube root of twenty seven and x sub one"),
    (r"$\frac{x+1}{y}$ at $90^\circ$", "open parenthesis x plus one close parenthesis over y at ninety degrees"),
    (r"$\frac{1}{2}x + 2\frac{3}{4}$", "one half x plus two and three quarters"),
    (r"$2^{1/2} \cdot 2^\frac{1}{3}$", "two to the power of one half times two to the power of one third"),
    (r"$\frac{a}{b} \div \frac{c}{d}$", "a over b divided by open parenthesis c over d close parenthesis"),
    (r"$y = mx$, $5\text{ km}$, \$5", "y equals m x, five kilometers, five dollars"),
    (r"$ x = 1 $ on the $x$-axis, the $n$th of $5 \% $", "x equals one on the x-axis, the n th of five percent"),
    ("He paid $5+tax or 6$.", "He paid five dollars plus tax or six dollars."),
    ("pages $3$-$5$", "pages three to five"),
    (r"$3\sqrt{2}$ and 5! - 3!", "three times the square root of two and five factorial minus three factorial"),
    (r"$\log_2 8$ for $5^{th}$ time", "log base two of eight for fifth time"),
]
_ORDINARY = [
    ("Read pages 3-5.", "Read pages three to five."),
    ("It takes 10-15 minutes, between 5-10 km.", "It takes ten to fifteen minutes, between five and ten kilometers."),
    ("World War II (1939-1945) began", "World War two, nineteen thirty nine to nineteen forty five, began"),
    ("They won 3-1", "They won three to one"),
    ("It made $1.2M in 2020.", "It made one point two million dollars in twenty twenty."),
    ("5$ now, 20€ later", "five dollars now, twenty euros later"),
    ("It costs $5.50 or $1,200.", "It costs five dollars and fifty cents or one thousand two hundred dollars."),
    ("$3-5 million at $5/hour", "three to five million dollars at five dollars per hour"),
    ("$5 and $6", "five dollars and six dollars"),
    ("5 km at 9.8 m/s^2", "five kilometers at nine point eight meters per second squared"),
    ("5 m tall, 1 kg, 6 ft 2 in", "five meters tall, one kilogram, six feet two inches"),
    ("a 10-km run at -5°C", "a ten-kilometer run at minus five degrees Celsius"),
    ("at 9:15 or 9:05 p.m.", "at nine fifteen or nine o five PM."),
    ("open 9am-5pm", "open nine AM to five PM"),
    ("between 3-5 pm, or from 9 a.m. to 5 p.m.", "between three and five PM, or from nine AM to five PM."),
    ("pages 3-5, 7-9 and 11-12", "pages three to five, seven to nine and eleven to twelve"),
    ("20-25 °C, 25 ℃", "twenty to twenty five degrees Celsius, twenty five degrees Celsius"),
    ("$10-$20 million, $-5", "ten to twenty million dollars, minus five dollars"),
    ("a board 12 in long on 4 July", "a board twelve inches long on the fourth of July"),
    (
        "$100k/year, $1.2mil, a $3-million house",
        "one hundred thousand dollars per year, one point two million dollars, a three million dollars house",
    ),
    (
        "2-3 times a week, 5-10$ for 1.2M people",
        "two to three times a week, five to ten dollars for one point two million people",
    ),
    ("2 GB/minute", "two gigabytes per minute"),
    ("a 3-5 page essay in 3-5 business days", "a three to five page essay in three to five business days"),
    ("the divisor of $1313$", "the divisor of one thousand three hundred thirteen"),
    ("in the ratio 2:3", "in the ratio two to three"),
    ("2024-05-01", "the first of May twenty twenty four"),
    (
        "May 5, 2024 and 25/12/2024",
        "the fifth of May twenty twenty four and the twenty fifth of December twenty twenty four",
    ),
    ("2010 apples in 1999", "two thousand ten apples in nineteen ninety nine"),
    ("the 1980s and the '90s", "the nineteen eighties and the nineties"),
    ("call (555) 123-4567", "call five five five, one two three, four five six seven"),
    ("No. 5 of Chapter IV, pp. 3-5", "Number five of Chapter four, pages three to five"),
    ("the 21st of May, #5", "the twenty first of May, number five"),
    ("Dr. Lee vs. a 5-year-old with covid-19", "Doctor Lee versus a five-year-old with covid-nineteen"),
    ("Who is it? A. 5 km. B. 1/2. C. $3.", "Who is it? A. five kilometers. B. one half. C. three dollars."),
    ("and/or, 1,2,3,4", "and or, one, two, three, four"),
]
_MARKUP = [
    ("<b>5</b>", "five"),
    ('<p class="q">What is <i>5</i><br/>+ 3?</p>', "What is five plus three?"),
    ("x<sup>2</sup> &gt; H<sub>2</sub>O", "x squared is greater than H sub two O"),
    ("a<b", "a is less than b"),
    ("# Title\n\n- **one** of `two`\n- _three_", "Title one of two three"),
    ("$3 million\n- pages 3-5", "three million dollars pages three to five"),
    ("[this](https://example.org/x) is it", "this is it"),
    ("He said “hi” to 2 1/2 well-known cats", "He said hi to two and one half well-known cats"),
    ("Fill in ____ and 7", "Fill in blank and seven"),
]


@pytest.mark.parametrize(("written", "spoken"), _MATHEMATICS + _LATEX + _ORDINARY + _MARKUP)
def test_what_is_said_is_what_is_asked(written: str, spoken: str) -> None:
    """Would catch a value, sign, unit or tag that is dropped, read as another, or left for the synthesizer to guess."""
    assert verbalize(written) == spoken


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("Run ```print(1)```", "code"),
        ('{"a": 1}', "code"),
        ("| a | b |", "table"),
        ("<table><tr><td>1</td></tr></table>", "table"),
        ("See https://example.org", "address"),
        ("![a cat](cat.png) what is it?", "picture"),
        ("what is <img src=a>", "picture"),
        ("a <b> c", "markup"),
        ("<foo>5</foo>", "tag <foo>"),
        ("<s>5</s> 6", "struck"),
        (r"\begin{align} x \end{align}", "environment"),
        (r"$\foo{x}$", r"\\foo"),
        (r"$\frac{1}{2$", "brace"),
        ("$x + 1", "dollar sign"),
        ("Что это?", "another script"),
        ("born 1/2/2020", "day and month"),
        ("on 2024-13-45", "no date"),
        ("a → b", "rightwards arrow"),
        ("A baker sold 12-7 loaves", "minus or a range"),
        ("3-5", "minus or a range"),
        ("call 555-1234", "minus or a range"),
        ("What is 10-15 minutes?", "minus or a range"),
        ("Total - 5 apples", "minus or a dash"),
        ("What is revenue - cost?", "minus or a dash"),
        ("the x-y plane", "minus"),
        ("2—1", "minus or a range"),
        ("f'(x) at 0", "derivative"),
        (r"$\frac{dy}{dx}$", "derivative"),
        ("an interval a-b", "minus"),
        ("the F-16", "minus"),
        ("- 5 + 3", "list or a sign"),
        ("It is 14:30 here, John 3:16", "time, a ratio or a score"),
        ("1,5 or 10 000", "one number or several"),
        ("3.000.000", "one number or several"),
        ("Henry VIII", "Roman numeral"),
        ("Is it 3? No. 5 is.", "'number'"),
        ("I have 5!", "factorial"),
        ("open 24/7", "saying"),
        ("a 50/50 chance", "saying"),
        ("on 5/12", "date or a fraction"),
        ("12/2024", "date or a fraction"),
        ("the A/C unit", "abbreviation"),
        ("12\n- 5\n- 3", "list or a sign"),
        ("10/2/5", "division of a division"),
        ("he/she", "slash between words"),
        ("5'2\" tall", "feet"),
        ("snake_case", "underscore"),
        ("C++ and C#", "without a value"),
        ("f***", "without a base"),
        ("**2**10", "without a base"),
        ("?!", "no words"),
        ("word " * 500, "2500 characters"),
    ],
)
def test_what_is_doubtful_is_refused(written: str, reason: str) -> None:
    """Would catch doubt that is spoken as if it were sure, or a refusal without a reason."""
    with pytest.raises(UnspeakableError, match=reason):
        verbalize(written)


def test_questions_of_the_examples_stay_as_they_are() -> None:
    """Would catch a rule that rewrites plain words: the examples' sets would be other sets."""
    texts = {question.text for question in questions_about(all_problems())}
    texts |= {question.text for question in CHAINS.training(300, 0, 0) + CHAINS.held_out(100, 0, 0)}
    assert len(texts) > 1000
    assert [text for text in texts if verbalize(text) != text] == []


def test_units_are_read_as_what_they_are() -> None:
    """Would catch another version of the normaliser that reads a unit differently: "5 m" was minutes to one."""
    spoken = {
        "mm": "millimeters", "cm": "centimeters", "m": "meters", "km": "kilometers", "ft": "feet", "mi": "miles",
        "g": "grams", "kg": "kilograms", "lb": "pounds", "oz": "ounces", "ml": "milliliters", "L": "liters",
        "s": "seconds", "min": "minutes", "h": "hours", "mph": "miles per hour", "km/h": "kilometers per hour",
        "m/s": "meters per second", "m^2": "square meters", "cm³": "cubic centimeters", "GB": "gigabytes",
        "kWh": "kilowatt hours", "°C": "degrees Celsius", "°F": "degrees Fahrenheit", "MHz": "megahertz", "W": "watts",
    }  # fmt: skip
    assert {unit: verbalize(f"the 20 {unit} there") for unit in spoken} == {
        unit: f"the twenty {words} there" for unit, words in spoken.items()
    }
    assert verbalize("1 m, 1 km/h, 0.5 kg") == "one meter, one kilometer per hour, zero point five kilograms"


def test_a_missing_normaliser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a traceback, or a question rejected as unspeakable, where a package is missing."""
    monkeypatch.setitem(sys.modules, "wetext", None)
    normaliser._normalizer.cache_clear()
    normaliser._normalize.cache_clear()
    assert verbalize("What is 2 + 3?") == "What is two plus three?"
    with pytest.raises(CordError, match=r"pip install megatron_cord\[speech\]") as caught:
        verbalize("a walk of 5 km")
    assert not isinstance(caught.value, UnspeakableError) and "\n" not in str(caught.value)


_FRAGMENTS = (
    r"12|7|1,000|.5|-|–|−| |/|1/2|:|**|*|^|_|{|}|(|)|[|]|$|€|%|°C|km|m/s|2024-05-01|1/2/2024|9:15|am|x|a|II|No.|#|+|=|?"
    r"|!|.|,|...|'|`|~|May|in|pages|What is|ratio|½|²|₂|π|√|≤|<|&|@|\frac{1}{2}|\frac|\sqrt|\times|\text{a}|<b>|</b>"
    r"|<sup>|</sup>|&lt;|1st|1980s|24/7|sin(|é|語|😀|٣|Ⅷ"
)
_PIECES = st.sampled_from([*_FRAGMENTS.split("|"), "|", '"', "\n", "\n- ", "\u200b", "\ue000", "\\", "e\u0301"])


def spoken_or_reason(text: str) -> tuple[str, str]:
    """Return what is spoken and "", or "" and the reason against it."""
    try:
        return verbalize(text), ""
    except UnspeakableError as error:
        return "", str(error)


@settings(max_examples=600, deadline=None)
@given(st.lists(_PIECES, max_size=14).map("".join) | st.text(max_size=60))
def test_never_fails_otherwise(text: str) -> None:
    """Would catch a crash, a message of several lines, or a digit or symbol that reaches the synthesizer."""
    spoken, reason = spoken_or_reason(text)
    assert bool(spoken) != bool(reason) and "\n" not in reason
    assert all(character.isalpha() or character in " .,;:?!'-" for character in spoken), spoken
    assert reason or any(character.isalpha() for character in spoken)


@pytest.mark.parametrize("piece", ["(", "{", "$", "^{", "- ", "1-", "$1-", "1/", "1,", "1:", "**", "√(", "'"])
@pytest.mark.parametrize("end", ["", "1", "a)"])
def test_long_repetitions_end_soon(piece: str, end: str) -> None:
    """Would catch a pattern that backtracks without end, and a recursion without a limit."""
    begin = time.process_time()
    spoken_or_reason((piece * 2000)[:1990] + end)
    assert time.process_time() - begin < 5


@given(st.integers(0, 10**12 - 1))
def test_numbers_are_read_back(number: int) -> None:
    """Would catch a wrong word: the words must be read as the same number, and agree with it as an answer."""
    words = verbalize(f"{number:,}")
    assert words == cardinal(number) and value_of(words) == number
    assert answers_agree(words, str(number)) and answers_agree(str(number), words)


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
