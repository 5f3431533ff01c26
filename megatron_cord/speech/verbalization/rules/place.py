"""Where a rule looks: a match in its text, and what stands around it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_cord.speech.verbalization.latex import END, START

_FAR = 200  # characters of context; more would make long texts slow
_WITHOUT_MARKS = dict.fromkeys(map(ord, START + END))


@dataclass(frozen=True)
class Place:
    """One match of a rule's pattern."""

    text: str
    match: re.Match[str]

    @property
    def before(self) -> str:
        """The text before the match, as far as it matters, without the marks of formulas."""
        return self.text[max(0, self.match.start() - _FAR) : self.match.start()].translate(_WITHOUT_MARKS)

    @property
    def after(self) -> str:
        """The text after the match, as far as it matters, without the marks of formulas."""
        return self.text[self.match.end() : self.match.end() + _FAR].translate(_WITHOUT_MARKS)

    @property
    def left(self) -> str:
        """The last character before the match that is no space; "" at the beginning."""
        return self.before.rstrip()[-1:]

    @property
    def right(self) -> str:
        """The first character after the match that is no space; "" at the end."""
        return self.after.lstrip()[:1]

    @property
    def touching(self) -> tuple[str, str]:
        """The characters that touch the match on both sides."""
        return self.before[-1:], self.after[:1]

    @property
    def in_formula(self) -> bool:
        """Whether the match lies in a LaTeX formula."""
        return self.text.rfind(START, 0, self.match.start()) > self.text.rfind(END, 0, self.match.start())


@dataclass(frozen=True)
class Rule:
    """A pattern and the words for its matches; None where it does not apply after all."""

    pattern: re.Pattern[str]
    speak: Callable[[Place], str | None]


def rule(pattern: str, speak: Callable[[Place], str | None], flags: int = 0) -> Rule:
    """Make a rule of a pattern's source."""
    return Rule(re.compile(pattern, flags), speak)
