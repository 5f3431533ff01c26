r"""Expressions compared by ``math_verify``: "x+1" and "1+x", "\sqrt{8}" and "2\sqrt{2}".

It takes what it can from a part of a text ("4 or 5", "2√3"), so that only what is an expression as a whole gets there:
no words, no times, and nothing that sympy would compute for hours.
"""

from __future__ import annotations

import logging
import re

from megatron_cord.reward.patience import within

_PATIENCE = 2.0  # seconds for one comparison
_LONGEST = 200  # characters
# What sympy may compute. Towers of powers, factorials and the like end in one huge multiplication that nothing
# interrupts.
_COMMANDS = {"frac", "sqrt", "pi", "left", "right", "cdot", "times", "pm", "infty", "cup", "in"}
_FUNCTIONS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp"}
_LONG_POWER = re.compile(r"(?:\^|\*\*)[^\d]{0,3}\d{4,}")
_WRITTEN = (
    (re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+|[a-zA-Z]))"), lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    (re.compile(r"(?<!\\)\bsqrt\s*\(([^()]*)\)"), lambda m: rf"\sqrt{{{m[1]}}}"),
    (re.compile("π"), lambda _: r"\pi "),
    (re.compile("∞"), lambda _: r"\infty "),
    (re.compile("×"), lambda _: r"\times "),
    (re.compile("[·⋅]"), lambda _: r"\cdot "),
    (re.compile("÷"), lambda _: "/"),
    (re.compile(r"(?<=[0-9])\s*(?=\([^,()]*\))"), lambda _: r"\cdot "),  # "2(3)" is no mixed number
)


def equal_expressions(first: str, second: str) -> bool:
    """Return whether two answers in plain notation are expressions of the same value."""
    first, second = map(_in_latex, (first, second))
    if not (_bounded(first) and _bounded(second)):
        return False
    from math_verify import parse, verify  # sympy takes a second to import, and plain numbers need none of it

    def compare() -> bool:
        one, other = (parse(f"${answer}$", parsing_timeout=None) for answer in (first, second))
        if not one or not other:
            return False
        return bool(verify(one, other, timeout_seconds=None) or verify(other, one, timeout_seconds=None))

    # Its own timeouts use signals, which work in the main thread only; without them it warns at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return within(_PATIENCE, compare, otherwise=False)


def _in_latex(text: str) -> str:
    for pattern, written in _WRITTEN:
        text = pattern.sub(written, text[: _LONGEST + 1])
    return text


def _bounded(answer: str) -> bool:
    """Tell expressions that are safe to compute: short, without words, with a digit, a command or a sign in them."""
    powers = answer.count("^") + answer.count("**")
    return (
        len(answer) <= _LONGEST
        and answer.isascii()
        and not re.search(r"[!?:;$#@&\"'`~]", answer)
        and not re.search(r"\d\s+\d", answer)
        and powers <= 2
        and (powers < 2 or not re.search(r"\^[^+\-=,]*\^|\*\*[^+\-=,]*\*\*", answer))
        and not _LONG_POWER.search(answer)
        and set(re.findall(r"\\([A-Za-z]+)", answer)) <= _COMMANDS
        and all(map(_is_product, re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", answer)))
        and bool(re.search(r"\d|\\|[-+=^/*]", answer))
    )


def _is_product(letters: str) -> bool:
    """Tell variables and functions from words: "xy" and "sin", not "or"."""
    return (
        letters.lower() in _FUNCTIONS
        or len(letters) == 1
        or bool(re.fullmatch(r"[xyz]+|[b-df-hj-np-tv-xz]{2,3}|abc?", letters))
    )
