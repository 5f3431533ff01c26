"""Read spoken mathematics back to its value: a small reader that shares nothing with the code that speaks.

Number words are read by text2num; the rest is a grammar of ten rules, in which "to the power of" binds closer than
"times", "over" and "divided by", and these closer than "plus" and "minus".
"""

from __future__ import annotations

import re
from fractions import Fraction

from text_to_num import text2num

_DIGITS = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_DIGIT_WORDS = set(_DIGITS.split())
_NUMBER_WORDS = _DIGIT_WORDS | set(f"{_TEENS} {_TENS} hundred thousand million billion".split())
_DENOMINATORS = {
    **{"half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10},
    **{"eleventh": 11, "twelfth": 12, "thirteenth": 13, "fourteenth": 14, "fifteenth": 15, "sixteenth": 16},
    **{"seventeenth": 17, "eighteenth": 18, "nineteenth": 19, "twentieth": 20},
}
_DENOMINATORS |= {f"{word}s": value for word, value in _DENOMINATORS.items()} | {"halves": 2}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_CURRENCIES = {"dollar", "euro", "pound"}


def value_of(words: str) -> Fraction:
    """Return the value of an expression in words.

    Raises:
        ValueError: the words are no expression.
    """
    reader = _Reader(re.sub(r"[?.]$", "", words).split())
    value = reader.sum()
    if reader.rest:
        raise ValueError(f"{words!r} goes on with {' '.join(reader.rest)!r}")
    return value


class _Reader:
    def __init__(self, words: list[str]) -> None:
        self.rest = words

    def _take(self, *words: str) -> bool:
        if self.rest[: len(words)] != list(words):
            return False
        self.rest = self.rest[len(words) :]
        return True

    def sum(self) -> Fraction:
        value = self._product()
        while True:
            if self._take("plus"):
                value += self._product()
            elif self._take("minus"):
                value -= self._product()
            else:
                return value

    def _product(self) -> Fraction:
        value = self._signed()
        while True:
            if self._take("times"):
                value *= self._signed()
            elif self._take("divided", "by") or self._take("over"):
                value /= self._signed()
            else:
                return value

    def _signed(self) -> Fraction:
        return -self._signed() if self._take("minus") else self._power()

    def _power(self) -> Fraction:
        base = self._value()
        if self._take("squared"):
            return base**2
        if self._take("cubed"):
            return base**3
        if self._take("to", "the", "power", "of"):
            return Fraction(base ** int(self._signed()))
        return base

    def _value(self) -> Fraction:
        if self._take("open", "parenthesis"):
            value = self.sum()
            if not self._take("close", "parenthesis"):
                raise ValueError(f"no parenthesis is closed before {self.rest}")
        else:
            value = self._number()
        if self._take("percent"):
            return value / 100
        if self.rest and self.rest[0].removesuffix("s") in _CURRENCIES:
            self.rest = self.rest[1:]
            if self.rest[:1] == ["and"]:
                self.rest = self.rest[1:]
                value += self._number() / 100
                self.rest = self.rest[1:]
        elif self.rest and self.rest[0] in {"cent", "cents", "penny", "pence"}:
            self.rest = self.rest[1:]
            value /= 100
        return value

    def _number(self) -> Fraction:
        value = Fraction(self._whole())
        if self._take("point"):
            digits = ""
            while self.rest and self.rest[0] in _NUMBER_WORDS and self.rest[0] not in _SCALES:
                digits += str(text2num(self.rest[0], "en"))
                self.rest = self.rest[1:]
            value += Fraction(int(digits), 10 ** len(digits))
            if self.rest and self.rest[0] in _SCALES:
                value *= _SCALES[self.rest[0]]
                self.rest = self.rest[1:]
            return value
        if self.rest and self.rest[0] in _DENOMINATORS:
            value /= _DENOMINATORS[self.rest[0]]
            self.rest = self.rest[1:]
        elif self.rest[:1] == ["and"]:
            self.rest = self.rest[1:]
            value += self._number()
        return value

    def _whole(self) -> int:
        count = 0
        while count < len(self.rest) and self.rest[count] in _NUMBER_WORDS:
            count += 1
        if not count:
            raise ValueError(f"no number begins {self.rest}")
        words, self.rest = self.rest[:count], self.rest[count:]
        if len(words) > 1 and words[0] in _DIGIT_WORDS and all(word in _DIGIT_WORDS for word in words):
            raise ValueError(f"{words} are digits, not a number")
        return int(text2num(" ".join(words), "en"))
