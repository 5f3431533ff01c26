r"""One notation for what is written in many: signs and fractions beyond ASCII, LaTeX's wrappers, Markdown's emphasis.

Nothing is computed here, and no character that carries a value is dropped: "2½" becomes "2 1/2", never "21/2".
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2212\ufe63", "-"),
        **dict.fromkeys("\u2018\u2019\u2032", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        "\u2044": "/",
        "\u2236": ":",
        "º": "°",
    }
)
# An en dash between two digits is a range; anywhere else it stands for a minus.
_DASH = re.compile(r"(?<![0-9])–|–(?![0-9])")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|boxed|mbox)\s*\{([^{}]*)\}")
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_SPACING = re.compile(r"\\(?:left(?![a-z])|right(?![a-z])|displaystyle|quad|[,;:! ])|~")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
_FRACTION = re.compile(r"\\frac\s*\{\s*([+-]?[0-9]+)\s*\}\s*\{\s*([+-]?[0-9]+)\s*\}")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree\b")
_EMPHASIS = re.compile(r"^([*_`]{1,3})(?=\S)(.+)(?<=\S)\1$", re.DOTALL)
_CLUTTER = " \t\n.!?;,:\"'"


@lru_cache(4096)
def normalized(answer: str) -> str:
    """Return an answer in plain notation: case kept, one space between words, without punctuation around it."""
    text = answer.translate(_FULLWIDTH).translate(_CHARACTERS)
    text = _DASH.sub("-", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = " ".join(text.split())
    for _ in range(4):  # wrappers nest: **\(\text{B}\)**
        before = text
        text = _WRAPPED.sub(r"\1", _strip(text))
        if match := _DELIMITED.fullmatch(text):
            text = next(part for part in match.groups() if part is not None)
        text = _EMPHASIS.sub(r"\2", text)
        if text == before:
            break
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _DEGREES.sub("°", _SPACING.sub(" ", text))
    text = re.sub(r"(?<=[0-9])\s*\\frac", r" \\frac", text)
    return _strip(" ".join(text.split()))


def plain_fractions(text: str) -> str:
    r"""Return the text with \frac of two whole numbers as 1/2."""
    return _FRACTION.sub(r"\1/\2", text)


def _strip(text: str) -> str:
    # A full stop before a digit is a decimal point.
    front = text.lstrip(_CLUTTER)
    start = len(text) - len(front)
    if start and text[start - 1] == "." and front[:1].isdigit():
        front = f".{front}"
    return front.rstrip(_CLUTTER)


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f" {above}/{below}"
