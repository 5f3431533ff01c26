r"""Turn written questions into words that can be spoken: "$\frac{1}{2} + 3$" is "one half plus three".

What cannot be read aloud so that a listener could answer (code, tables, pictures, addresses, an unknown LaTeX command,
another script) is refused with its reason, never spoken as noise.

What it simplifies: English; clock times and years are read as the numbers they are written with; one level of braces
inside LaTeX arguments.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_cord.data.number_words import cardinal, ordinal
from megatron_cord.errors import CordError


class UnspeakableError(CordError):
    """A text that cannot be spoken; the message is the reason."""


_REFUSED = (
    (re.compile(r"```|^(?: {4}|\t)\S.*[;{}()=]", re.MULTILINE), "it contains code"),
    (re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE), "it contains a table"),
    (re.compile(r"!\[[^\]]*\]\(|<img\b", re.IGNORECASE), "it contains a picture"),
    (re.compile(r"https?://|www\.\w|\b\S+@\S+\.\w"), "it contains an address"),
    (re.compile(r"\d/\d+/\d"), "it contains a date in digits"),
    (re.compile(r"\\begin\b|\\\\"), "it contains a LaTeX environment"),
)
_ARGUMENT = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_FRACTION = re.compile(rf"\\[dt]?frac\s*(?:{_ARGUMENT}\s*{_ARGUMENT}|(\d)(\d))")
_ROOT = re.compile(rf"\\sqrt\s*(?:\[(\w+)\])?\s*{_ARGUMENT}")
_WRAPPED = re.compile(rf"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|boxed|mbox)\s*{_ARGUMENT}")
_POWER = re.compile(rf"\s*\^\s*(?:{_ARGUMENT}|(\w))")
_INDEX = re.compile(rf"\s*_(?:{_ARGUMENT}|(\w)(?!\w))")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_COMMANDS_BY_WORD = {
    "times": "times cdot",
    "divided by": "div",
    "plus or minus": "pm",
    "is about": "approx sim",
    "is not equal to": "ne neq",
    "is at most": "le leq",
    "is at least": "ge geq",
    "is less than": "lt",
    "is greater than": "gt",
    "degrees": "circ degree",
    "and so on": "dots ldots cdots",
    "to": "to rightarrow",
    "infinity": "infty",
    "sine": "sin",
    "cosine": "cos",
    "tangent": "tan",
    "natural log": "ln",
    "": "left right quad displaystyle , ; ! : ( ) [ ] { }",
}
_COMMANDS = {command: word for word, commands in _COMMANDS_BY_WORD.items() for command in commands.split()}
_COMMANDS |= {
    name: name
    for name in ["pi", "theta", "alpha", "beta", "gamma", "log", "in", "angle", "triangle", "%", "$", "#", "&"]
}  # spoken by their names
_COMMANDS |= {" ": "", "_": " "}
_SYMBOLS_BY_WORD = {
    "plus": "+",
    "minus": "−",
    "plus or minus": "±",
    "times": "×·*",
    "divided by": "÷",
    "over": "/",
    "equals": "=",
    "is less than": "<",
    "is greater than": ">",
    "is at most": "≤",
    "is at least": "≥",
    "is not equal to": "≠",
    "is about": "≈",
    "the square root of": "√",
    "squared": "²",
    "cubed": "³",
    "one half": "½",
    "one quarter": "¼",
    "three quarters": "¾",
    "degrees": "°",
    "percent": "%",
    "pi": "π",
    "infinity": "∞",
    "number": "#",
    "and": "&",
    "at": "@",
    "euros": "€",
    "pounds": "£",
}
_SYMBOLS = {symbol: word for word, symbols in _SYMBOLS_BY_WORD.items() for symbol in symbols}
_PUNCTUATION = set(".,;:?!'-")
_PLAIN = str.maketrans(
    {
        "“": " ",
        "”": " ",
        "‘": "'",
        "’": "'",
        "–": "-",
        "—": ",",
        "…": ".",
        "\u00a0": " ",
        '"': " ",
        "`": " ",
        "(": ", ",
        ")": ", ",
        "[": ", ",
        "]": ", ",
    }
)
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
# Dollar signs in pairs around a formula, not the prices "$5 + $6".
_FORMULA = re.compile(r"\$(?=\S)([A-Za-z]|[^$]*[\\^_=+{][^$]*)(?<=\S)\$(?!\d)")
_MONEY = re.compile(rf"([$€£])\s?({_NUMBER})(?:\s(thousand|million|billion)\b)?")
_CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
_SIMPLE_FRACTION = re.compile(r"(?<![\d./])(?:(\d+)\s)?(\d{1,3})\s?/\s?(\d{1,3})(?![\d/]|\.\d)")
_ORDINAL = re.compile(r"\b(\d{1,9})(?:st|nd|rd|th)\b", re.IGNORECASE)
_RANGE = re.compile(r"(?<=\d)\s?-\s?(?=\d)")
_NEGATIVE = re.compile(r"(?:(?<=^)|(?<=[\s(=,]))-\s?(?=[\d.\\a-zA-Z$])")
_DIGITS = re.compile(_NUMBER)
_LONGEST_NUMBER = 15  # digits; longer ones are read digit by digit


def verbalize(text: str, *, max_characters: int = 2000) -> str:
    r"""Return the text as words for a voice.

    Args:
        text: a question, with Markdown or LaTeX in it or not.
        max_characters: longer texts are refused, as a listener cannot follow them.

    Returns:
        One line of words and punctuation, without digits and symbols.

    Raises:
        UnspeakableError: with the reason.
    """
    if not any(character.isalnum() for character in text):
        raise UnspeakableError("it has no words")
    if len(text) > max_characters:
        raise UnspeakableError(f"it has {len(text)} characters, more than {max_characters}")
    for pattern, reason in _REFUSED:
        if pattern.search(text):
            raise UnspeakableError(reason)
    text = _MONEY.sub(_money, _FORMULA.sub(r" \1 ", text))
    text = _without_latex(re.sub(r"_{2,}", " blank ", text))
    text = re.sub(r"(?m)^\s*(?:#{1,6}|[*>-])\s+", "", text).replace("**", "")  # Markdown's headings, lists and bold
    text = _numbers(text.translate(_PLAIN))
    text = "".join(f" {_SYMBOLS[c]} " if c in _SYMBOLS else c for c in text)
    _refuse_other_characters(text)
    return re.sub(r"(?:\s*,)+(?=\s*[.,;:?!])", "", re.sub(r"\s+([.,;:?!])", r"\1", " ".join(text.split()))).strip(" ,")


def _without_latex(text: str) -> str:
    for _ in range(8):  # from the inside out; deeper nesting is refused below
        before = text
        text = _WRAPPED.sub(r" \1 ", text)
        text = _FRACTION.sub(lambda m: _fraction((m[1] or m[3] or "").strip(), (m[2] or m[4] or "").strip()), text)
        text = _ROOT.sub(lambda m: f" the {_root(m[1])} root of {m[2]} ", text)
        if text == before:
            break
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", " degrees ", text)
    text = _INDEX.sub(lambda m: f" sub {m[1] or m[2]} ", _POWER.sub(lambda m: _power(m[1] or m[2]), text))
    text = _COMMAND.sub(_command, text.replace("$$", " "))
    if re.search(r"[\\{}^]", text):
        raise UnspeakableError("it contains LaTeX that is nested too deeply or broken")
    return re.sub(r"(?<!\d)\$|\$(?!\d)", " ", text)


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name not in _COMMANDS:
        raise UnspeakableError(f"it contains the LaTeX command \\{name}")
    word = _COMMANDS[name]
    return f" {word} " if len(word) != 1 else word


def _fraction(above: str, below: str) -> str:
    if above.isdigit() and below.isdigit() and len(above + below) <= 6:
        return f" {above}/{below} "  # read below, as fractions in plain text are
    return f" {above} over {below} "


def _root(degree: str | None) -> str:
    return {None: "square", "2": "square", "3": "cube"}.get(degree) or (
        f"{degree}th" if str(degree).isdigit() else f"{degree} th"
    )


def _power(exponent: str) -> str:
    return {"2": " squared ", "3": " cubed "}.get(exponent.strip(), f" to the power of {exponent} ")


def _numbers(text: str) -> str:
    text = _NEGATIVE.sub("minus ", text)
    text = _SIMPLE_FRACTION.sub(_fraction_words, text)
    text = _ORDINAL.sub(lambda m: f" {ordinal(int(m[1]))} ", text)
    text = _RANGE.sub(" to ", text)
    text = re.sub(r"(?<=\d)\s?:\s?(?=\d)", " ", text)
    return _DIGITS.sub(lambda m: f" {_number_words(m[0])} ", text)


def _number_words(digits: str) -> str:
    whole, _, decimals = digits.replace(",", "").partition(".")
    if len(whole) > _LONGEST_NUMBER:
        return _digit_by_digit(whole + decimals)
    return cardinal(int(whole)) + (f" point {_digit_by_digit(decimals)}" if decimals else "")


def _digit_by_digit(digits: str) -> str:
    return " ".join(cardinal(int(digit)) for digit in digits)


def _fraction_words(match: re.Match[str]) -> str:
    whole, above, below = match[1], int(match[2]), int(match[3])
    if below < 2 or below > 100:
        parts = f"{cardinal(above)} over {cardinal(below)}"
    else:
        name = {2: "half", 4: "quarter"}.get(below) or ordinal(below)
        parts = f"{cardinal(above)} {name if above == 1 else 'halves' if below == 2 else f'{name}s'}"
    return f" {f'{_number_words(whole)} and ' if whole else ''}{parts} "


def _money(match: re.Match[str]) -> str:
    sign, amount, scale = match.groups()
    name, part = _CURRENCIES[sign]
    whole, _, decimals = amount.replace(",", "").partition(".")
    if scale:
        return f"{amount} {scale} {name}s"
    whole_words = f"{whole} {name if int(whole) == 1 else f'{name}s'}"
    if len(decimals) != 2 or decimals == "00":
        return whole_words if not decimals.strip("0") else f"{amount} {name}s"
    plural = {"penny": "pence"}.get(part, f"{part}s")
    return f"{whole_words} and {int(decimals)} {part if int(decimals) == 1 else plural}"


def _refuse_other_characters(text: str) -> None:
    for character in text:
        if character.isspace() or character in _PUNCTUATION:
            continue
        name = unicodedata.name(character, f"U+{ord(character):04X}")
        if not character.isalpha():
            raise UnspeakableError(f"it contains {character!r} ({name.lower()})")
        if not name.startswith("LATIN"):
            raise UnspeakableError(f"it contains letters of another script ({name.split()[0].lower()})")
