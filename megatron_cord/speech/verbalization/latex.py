r"""LaTeX as plain mathematics: ``\frac{x+1}{2} \times 3`` is "(x+1)/2 × 3", between marks around each formula.

In a formula a hyphen is a minus (−). Fractions of whole numbers keep their form "1/2"; other arguments get parentheses
unless they are one number or letter, so that what belongs together is heard together.
"""

from __future__ import annotations

import re

from megatron_cord.speech.verbalization.errors import UnspeakableError

START, END = "\ue000", "\ue001"  #: around each formula in the result

_DEEPEST = 12
_DELIMITED = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\\\[(?P<bracket>.+?)\\\]|\\\((?P<paren>.+?)\\\)"
    r"|(?<![A-Za-z0-9$\\])\$(?=\S)(?P<inline>(?:\\.|[^$\\\n])+?)(?<!\s)\$(?!(?!(?:st|nd|rd|th)\b)[A-Za-z0-9$])"
    r"|(?<![A-Za-z0-9$\\])\$\s?(?P<spaced>(?:\\.|[^$\\\n])*?(?:\\[^$]|[\^_={])(?:\\.|[^$\\\n])*?)\s?\$(?![A-Za-z0-9$])",
    re.DOTALL,
)
_FUNCTIONS = {"sin", "cos", "tan", "log", "max", "min", "gcd", "lcm", "mod", "exp"}
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SYMBOLS_BY_COMMANDS = {
    "×": "times",
    "·": "cdot ast",
    "÷": "div",
    "±": "pm",
    "≈": "approx sim",
    "≠": "ne neq",
    "≤": "le leq leqslant",
    "≥": "ge geq geqslant",
    "<": "lt",
    ">": "gt",
    "°": "degree circ",
    "∞": "infty",
    " and so on ": "dots ldots cdots",
    " to ": "to rightarrow",
    " sine ": "sin",
    " cosine ": "cos",
    " tangent ": "tan",
    " natural log ": "ln",
    " log ": "log",
    " the set ": "{",
    ",": "}",
    " ": "left right quad qquad displaystyle limits big Big bigl bigr , ; ! : ~",
    "(": "lparen",
    ")": "rparen",
    " in ": "in",
    " angle ": "angle",
    " triangle ": "triangle",
    " modulo ": "mod bmod",
    "%": "%",
    "$": "$",
    "#": "#",
    "&": "&",
    "_": "_",
}
_SYMBOLS = {command: symbol for symbol, commands in _SYMBOLS_BY_COMMANDS.items() for command in commands.split()}
_SYMBOLS[" "] = " "
_GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega Delta Sigma Omega Pi"
_SYMBOLS |= {name: f" {name.lower()} " for name in _GREEK.split()} | {"pi": "π"}
_TEXT = {"text", "mathrm", "operatorname", "mbox", "textrm", "textnormal"}
_STYLE = {"textbf", "textit", "mathbf", "mathit", "emph", "underline", "boxed"}
_FRACTIONS, _BINOMIALS = {"frac", "dfrac", "tfrac", "cfrac"}, {"binom", "dbinom", "tbinom"}
_ARGUMENTS = dict.fromkeys(_FRACTIONS | _BINOMIALS, 2) | dict.fromkeys(_TEXT | _STYLE | {"sqrt"}, 1)
_ATOM = re.compile(r"\s*(?:\d[\d,]*(?:\.\d+)?|[A-Za-zπ∞])\s*")
_TOUCHING = re.compile(r"\s*(?:[A-Za-z0-9({^]|\\(?:[dt]?frac|sqrt|pi|left|alpha|beta|theta)\b)")
_WHOLE = re.compile(r"\s*\d{1,3}\s*")


def plain_mathematics(text: str) -> str:
    """Return the text with each formula, and each LaTeX command outside one, as plain mathematics.

    Raises:
        UnspeakableError: a command is unknown, or braces do not match or are nested too deeply.
    """
    pieces, end = [], 0
    for match in _DELIMITED.finditer(text):
        content = next(group for group in match.groups() if group is not None)
        if (match["inline"] or match["spaced"]) and not _is_formula(content):
            continue
        pieces += [_Parser(text[end : match.start()], formula=False).parse(), _formula(content)]
        end = match.end()
    pieces.append(_Parser(text[end:], formula=False).parse())
    return "".join(pieces)


def _is_formula(content: str) -> bool:
    r"""Tell "$x + 1$" from the prices in "$5 and $6" and "$5+tax or 6$"."""
    words = [word for word in _WORD.findall(content) if word not in _FUNCTIONS]
    if re.search(r"\\", content):
        return True
    if re.search(r"[\^_=+{<>-]", content):
        return all(len(word) < 3 or word.isupper() for word in words)
    return not words or bool(re.fullmatch(r"[0-9]*[A-Za-z]{2,4}", content))


def _formula(content: str) -> str:
    plain = _Parser(content, formula=True).parse()
    if re.fullmatch(r"\s*\d[\d,]*(?:\.\d+)?\s*", plain):
        return plain  # a number is one inside a formula and outside
    return f"{START}{plain}{END}"


class _Parser:
    """A parser by recursive descent of one text or formula."""

    def __init__(self, text: str, *, formula: bool, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise UnspeakableError("it contains LaTeX that is nested too deeply")
        self._text, self._formula, self._depth, self._at = text, formula, depth, 0
        self._out: list[str] = []

    def parse(self) -> str:
        while self._at < len(self._text):
            character = self._text[self._at]
            self._at += 1
            if character == "\\":
                self._command(self._name())
            elif character == "{":
                self._at -= 1
                content = self._argument()
                if not self._formula and re.search(r"[:;=\"]", content):
                    raise UnspeakableError("it contains braces as of code")
                self._out.append(self._inner(content, formula=self._formula))
            elif character == "}":
                raise UnspeakableError("it contains LaTeX whose braces do not match")
            elif character in "^_" and self._text[self._at : self._at + 1] in {"{", "\\"}:
                self._script(character)
            elif self._formula and character in "-~":
                self._out.append("−" if character == "-" else " ")
            else:
                self._out.append(character)
        return "".join(self._out)

    def _name(self) -> str:
        match = re.compile(r"[A-Za-z]+|.|$", re.DOTALL).match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match[0]

    def _argument(self) -> str:
        """Return the source of the next argument: a group without its braces, a command, or one character."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        rest = self._text[self._at : self._at + 1]
        if rest == "\\":
            start = self._at
            self._at += 1
            for _ in range(_ARGUMENTS.get(self._name(), 0)):
                self._argument()
            return self._text[start : self._at]
        if rest != "{":
            self._at += 1
            if not rest:
                raise UnspeakableError("it contains LaTeX without an argument")
            return rest
        depth = 0
        for place in range(self._at, len(self._text)):
            if self._text[place - 1 : place] == "\\":
                continue
            depth += {"{": 1, "}": -1}.get(self._text[place], 0)
            if depth == 0:
                content = self._text[self._at + 1 : place]
                self._at = place + 1
                return content
        raise UnspeakableError("it contains LaTeX whose braces do not match")

    def _inner(self, source: str, *, formula: bool = True) -> str:
        return _Parser(source, formula=formula, depth=self._depth + 1).parse()

    def _grouped(self, source: str) -> str:
        plain = self._inner(source)
        return plain.strip() if _ATOM.fullmatch(plain) else _in_parentheses(plain)

    def _script(self, kind: str) -> None:
        source = self._argument().strip()
        if kind == "^" and source in {r"\circ", r"\degree", "°"}:
            self._out.append("°")
        elif kind == "^" and (ordinal := re.fullmatch(r"(?:\\(?:text|mathrm)\s*\{)?(st|nd|rd|th)\}?", source)):
            self._out.append(ordinal[1] if "".join(self._out)[-1:].isdigit() else f" {ordinal[1]}")
        else:
            self._out.append(kind + _in_parentheses(self._inner(source)))

    def _command(self, name: str) -> None:
        if name in _FRACTIONS:
            self._fraction(self._argument(), self._argument())
        elif name == "sqrt":
            self._root()
        elif name in _BINOMIALS:
            self._out.append(f" {self._grouped(self._argument())} choose {self._grouped(self._argument())} ")
        elif name in _TEXT:
            content = self._inner(self._argument(), formula=False)
            self._out.append(f"{END}{content}{START}" if self._formula else content)
        elif name in _STYLE:
            self._out.append(self._inner(self._argument(), formula=self._formula))
        elif name in _SYMBOLS:
            self._out.append(_SYMBOLS[name])
        else:
            raise UnspeakableError(f"it contains the LaTeX command \\{name}" if name else "it ends in a backslash")

    def _fraction(self, above: str, below: str) -> None:
        """Write a fraction; in parentheses where what stands beside it would be taken for a part of it."""
        if re.match(r"\s*d(?![a-z]*[aeiou])", above) and re.fullmatch(r"\s*d\s*[a-z](?:\^.*)?\s*", below):
            raise UnspeakableError("it contains a derivative")
        top, bottom = self._inner(above), self._inner(below)
        before, touches = "".join(self._out), _TOUCHING.match(self._text, self._at)
        if _WHOLE.fullmatch(top) and _WHOLE.fullmatch(bottom):
            fraction = f"{top.strip()}/{bottom.strip()}"
            if before[-1:].isdigit() and not touches:
                self._out.append(f" {fraction}")  # a mixed number
                return
        else:
            fraction = f"{self._grouped(above)}/{self._grouped(below)}"
        is_part = touches or before.rstrip()[-1:] in {"/", "÷", "^", ")"} or before[-1:].isalnum()
        self._out.append(f"({fraction})" if is_part else fraction)

    def _root(self) -> None:
        degree = re.compile(r"\s*\[([^\]]*)\]").match(self._text, self._at)
        if degree is None:
            self._out.append(f"√{self._grouped(self._argument())}")
            return
        self._at = degree.end()
        name = {"2": "square", "3": "cube"}.get(degree[1].strip())
        if name is None and re.fullmatch(r"\s*(?:\d{1,2}|[a-z])\s*", degree[1]):
            name = f"{degree[1].strip()}th" if degree[1].strip().isdigit() else f"{degree[1].strip()} th"
        if name is None:
            raise UnspeakableError("it contains a root of a degree that is neither a number nor a letter")
        self._out.append(f" the {name} root of {self._grouped(self._argument())}")


def _in_parentheses(plain: str) -> str:
    return plain.strip() if re.fullmatch(r"\s*\([^()]*\)\s*", plain) else f"({plain})"
