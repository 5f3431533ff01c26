"""Two thousand expressions are spoken and read back to the value they were written for, by a reader of its own."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from fractions import Fraction

import pytest

from megatron_cord.reward import answers_agree
from megatron_cord.speech import verbalize
from tests.speech.spoken_mathematics import value_of

_COUNT = 2000


@dataclass(frozen=True)
class Written:
    """An expression in plain text and in LaTeX, its value, and how closely its last operator binds (3: a value)."""

    plain: str
    latex: str
    value: Fraction
    binding: int = 3


def _whole(draw: random.Random) -> Written:
    number = draw.choice([draw.randrange(20), draw.randrange(1000), draw.randrange(10**6), draw.randrange(10**12)])
    text = draw.choice([str(number), f"{number:,}"])
    return Written(text, text, Fraction(number))


def _decimal(draw: random.Random) -> Written:
    text = f"{draw.randrange(2000):,}.{draw.randrange(10 ** draw.randrange(1, 5)):0{draw.randrange(1, 4)}}"
    return Written(text, text, Fraction(text.replace(",", "")))


def _fraction(draw: random.Random) -> Written:
    above, below = draw.randrange(1, 40), draw.randrange(1, 120)
    return Written(
        f"{above}/{below}", rf"\{draw.choice(['', 'd', 't'])}frac{{{above}}}{{{below}}}", Fraction(above, below), 2
    )


def _mixed(draw: random.Random) -> Written:
    whole, below = draw.randrange(1, 100), draw.randrange(2, 21)
    above = draw.randrange(1, below)
    text = f"{whole} {above}/{below}"
    return Written(text, rf"{whole}\frac{{{above}}}{{{below}}}", whole + Fraction(above, below))


def _percentage(draw: random.Random) -> Written:
    number = draw.choice([str(draw.randrange(200)), f"{draw.randrange(100)}.{draw.randrange(10)}"])
    return Written(f"{number}{draw.choice(['', ' '])}%", rf"{number}\%", Fraction(number) / 100)


def _money(draw: random.Random) -> Written:
    sign, whole, cents = draw.choice("$€£"), draw.randrange(5000), draw.randrange(100)
    scale, factor = draw.choice([("M", 10**6), ("k", 10**3), ("B", 10**9), (" million", 10**6), (" thousand", 10**3)])
    tenths = f"{draw.randrange(100)}.{draw.randrange(1, 10)}"
    number, value = draw.choice(
        [
            (f"{whole:,}", Fraction(whole)),
            (f"{whole:,}.{cents:02}", whole + Fraction(cents, 100)),
            (tenths + scale, Fraction(tenths) * factor),
        ]
    )
    text = f"{sign}{number}"
    if number == str(whole) and draw.random() < 0.5:
        text = f"{number}{sign}"
    return Written(text, re.sub(r" [a-z]+$", r"\\text{\g<0>}", text.replace("$", r"\$")), value)


def _power(draw: random.Random) -> Written:
    base, exponent = draw.randrange(1, 100), draw.choice([2, 3, draw.randrange(11), -draw.randrange(1, 9)])
    plain = f"{base}{draw.choice(['^', '**', ' ^ ', ' ** '])}{draw.choice([exponent, f'({exponent})'])}"
    return Written(plain, f"{base}^{{{exponent}}}", Fraction(base) ** exponent)


_VALUES = (_whole, _whole, _decimal, _fraction, _mixed, _percentage, _money, _power)


def _negative(draw: random.Random) -> Written:
    value = draw.choice((_whole, _decimal))(draw)
    return Written(f"-{value.plain}", f"-{value.latex}", -value.value, 2)


def _grouped(written: Written) -> Written:
    return Written(f"({written.plain})", f"({written.latex})", written.value)


def _expression(draw: random.Random, depth: int = 2) -> Written:
    if depth == 0 or draw.random() < 0.15:
        return (_negative if draw.random() < 0.1 else draw.choice(_VALUES))(draw)
    left, right = _expression(draw, depth - 1), _expression(draw, depth - 1)
    kind = draw.choice("+-*/" if right.value else "+-*")
    if kind in "*/" and left.binding < 2:
        left = _grouped(left)
    if right.binding < 2 or (kind in "*/" and right.binding < 3) or right.plain.startswith("-"):
        right = _grouped(right)
    if kind in "*/" and left.binding < 3:
        left = _grouped(left)
    space = draw.choice(["", " "]) if kind != "-" or draw.random() < 0.5 else " "
    if kind == "/":
        return Written(
            f"{left.plain}{space}÷{space}{right.plain}",
            rf"\frac{{{left.latex}}}{{{right.latex}}}" if draw.random() < 0.5 else rf"{left.latex} \div {right.latex}",
            left.value / right.value,
            2,
        )
    plain = {"+": "+", "-": draw.choice("-−"), "*": draw.choice("*×·")}[kind]
    latex = {"+": "+", "-": "-", "*": draw.choice([r"\times", r"\cdot"])}[kind]
    value = {"+": left.value + right.value, "-": left.value - right.value, "*": left.value * right.value}[kind]
    return Written(
        f"{left.plain}{space}{plain}{space}{right.plain}",
        f"{left.latex} {latex} {right.latex}",
        value,
        2 if kind == "*" else 1,
    )


@pytest.mark.parametrize("style", ["plain", "latex"])
def test_spoken_expressions_are_read_back(style: str) -> None:
    """Would catch a digit, sign, operator, parenthesis or unit that is lost, moved or read as another."""
    draw = random.Random(14)
    for _ in range(_COUNT // 2):
        written = _expression(draw)
        text = f"What is {written.plain}?" if style == "plain" else f"What is ${written.latex}$?"
        spoken = verbalize(text)
        assert value_of(spoken.removeprefix("What is ")) == written.value, (text, spoken)


@pytest.mark.parametrize("frame", ["Calculate {}.", "{} = ?", "Solve: {}", "What is the value of {}?", "x = {}"])
def test_differences_are_read_back_in_any_frame(frame: str) -> None:
    """Would catch a minus that is taken for a range by the words around it."""
    draw = random.Random(3)
    for _ in range(100):
        first, second = draw.randrange(2000), draw.randrange(2000)
        spoken = verbalize(frame.format(f"{first}-{second}"))
        begin, end = (
            frame.format("|").replace("=", "equals").replace("?", "what?" if "= ?" in frame else "?").split("|")
        )
        expression = spoken.removeprefix(begin).removesuffix(end.rstrip())
        assert value_of(expression) == first - second, (first, second, spoken)


def test_spoken_values_agree_with_written_ones() -> None:
    """Would catch an answer in words that the reward takes for another value than the one that was spoken."""
    draw = random.Random(5)
    values = (_whole, _decimal, _fraction, _mixed, _percentage, _money, _negative)
    for _ in range(_COUNT // 2):
        written = draw.choice(values)(draw)
        if "€" in written.plain and "." in written.plain:
            continue  # cents are parts of dollars to the reward
        spoken = verbalize(written.plain)
        assert answers_agree(spoken, written.plain) and answers_agree(written.plain, spoken), (written.plain, spoken)
