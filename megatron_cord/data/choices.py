"""Multiple choice: the letters of the choices, how sets write choices and gold answers, and how choices are read out.

Sets write them as a list of texts or numbers, as {"label": […], "text": […]}, as a list of {"label", "text"}, as
{"A": "iron", "B": "wood"}, or in one text "A. iron B. wood". Whatever it was, here it is a tuple of texts without
letters, and the gold answer a letter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJ"
_LEADING = re.compile(r"\s*[(\[]?\s*([A-Ja-j])\s*[.):\]]\s*(?=\S)")
_MARK = re.compile(r"(?:(?<=\s)|^)(?P<open>[(\[]?)(?P<letter>[A-Ja-j])\s?(?P<close>[.):\]])\s*(?=\S)")
_BOUNDARY = re.compile(r"(?:^|[.?!:;,\n])\s*$")
_LONGEST_TEXT = 20_000  # characters in which options are looked for
_MOST_MARKS = 200
_SHOWN = 80  # characters of what is refused


def lettered(choices: Sequence[str]) -> str:
    """Return the choices as they are read out: "A. iron. B. wood."."""
    return " ".join(
        f"{letter}. {choice.strip().rstrip('.')}." for letter, choice in zip(LETTERS, choices, strict=False)
    )


_Chain = tuple[int, int, tuple[re.Match[str], ...]]  # letters, stops before them, marks


class ChoicesError(ValueError):
    """Choices, or a gold answer, that cannot be used; the message shows them."""


@dataclass(frozen=True)
class Choices:
    """The choices of a question.

    Attributes:
        texts: behind the letters A, B, …; without letters of their own.
        labels: how the set calls them ("A", "1", …), in order.
        numbers: the set gives them as numbers, so that a number as gold answer is one of them and no index.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    numbers: bool = False

    def letter_of(self, gold: Any) -> str:
        """Return the letter of a gold answer: a letter, a label, a choice's text, or an index from 0.

        Raises:
            ChoicesError: it is none of these, or means two choices.
        """
        letters = LETTERS[: len(self.texts)]
        if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
            raise ChoicesError(f"its answer {_shown(gold)} is neither a letter, a text nor an index")
        if isinstance(gold, (int, float)) and not self.numbers:
            return self._letter_at(gold)
        text = _text(gold)
        if self.labels.count(text) == 1:
            return letters[self.labels.index(text)]
        named = re.fullmatch(r"[(\[]?([A-Ja-j])[.):\]]?", text)
        if text not in self.texts and named and named[1].upper() in letters:
            return named[1].upper()
        same = self._places(text) or self._places(_unlettered(text)[0])
        if len(same) == 1:
            return letters[same[0]]
        problem = "none" if not same else f"{len(same)}"
        raise ChoicesError(
            f"its answer {_shown(gold)} is {problem} of its choices, nor a letter up to {letters[-1]}; "
            f"they are {_shown(list(self.texts))}"
        )

    def _places(self, text: str) -> list[int]:
        exact = [i for i, choice in enumerate(self.texts) if choice and choice == text]
        return exact or [i for i, choice in enumerate(self.texts) if choice and _folded(choice) == _folded(text)]

    def _letter_at(self, index: float) -> str:
        letters = LETTERS[: len(self.texts)]
        same = [i for i, choice in enumerate(self.texts) if choice == _text(index)]
        if float(index).is_integer() and 0 <= index < len(letters):
            if same and same != [int(index)]:
                raise ChoicesError(
                    f"its answer {_shown(index)} is an index and another choice's text; write the choice's letter"
                )
            return letters[int(index)]
        if len(same) != 1:
            raise ChoicesError(
                f"its answer {_shown(index)} is neither an index from 0 to {len(letters) - 1} nor one of its choices; "
                f"they are {_shown(list(self.texts))}"
            )
        return letters[same[0]]


def read_choices(value: Any) -> Choices:
    """Return choices however a set writes them.

    Raises:
        ChoicesError: they are not 2 to 10 texts.
    """
    labels, texts = _labels_and_texts(value)
    if not 2 <= len(texts) <= len(LETTERS) or not all(_is_text(text) for text in texts):
        raise ChoicesError(f"its choices are not 2 to {len(LETTERS)} texts: {_shown(value)}")
    numbers = not any(isinstance(text, str) for text in texts)
    written = [_text(text) for text in texts]
    parts = [_unlettered(text) for text in written]
    if "".join(letter for _, letter in parts) == LETTERS[: len(parts)] and all(text for text, _ in parts):
        written = [text for text, _ in parts]
    return Choices(tuple(written), tuple(map(str, labels)), numbers)


def split_options(text: str) -> tuple[str, ...]:
    """Return the options of a text "Which …? A. iron B. wood", cut in the order of their letters; () for none.

    Of several ways to cut, the one with most options wins, then the one whose letters stand behind a stop or a line's
    end, so that "A. Vitamin A. B. Vitamin C." has two.
    """
    text = text[-_LONGEST_TEXT:]
    marks = list(_MARK.finditer(text))
    best: _Chain = (0, 0, ())
    for style in dict.fromkeys(map(_style, marks)):
        chain = _longest_chain(text, [mark for mark in marks if _style(mark) == style][-_MOST_MARKS:])
        best = max(best, chain, key=lambda chain: chain[:2])
    starts, ends = [m.end() for m in best[2]], [*(m.start() for m in best[2][1:]), len(text)]
    return tuple(_option(text[start:end]) for start, end in zip(starts, ends, strict=True)) if best[0] > 1 else ()


def _style(mark: re.Match[str]) -> tuple[str, str, bool]:
    return mark["open"], mark["close"], mark["letter"].islower()


def _longest_chain(text: str, marks: Sequence[re.Match[str]]) -> _Chain:
    """Return the marks A, B, … with most letters and then most stops before them.

    Of equals it takes the last A, as a question before the options may name one, and the first of the others.
    """
    chains: list[_Chain] = [(0, 0, ())] * len(LETTERS)
    for mark in marks:
        place = LETTERS.index(mark["letter"].upper())
        before: _Chain = chains[place - 1] if place else (0, 0, ())
        stops = before[1] + bool(_BOUNDARY.search(text[max(0, mark.start() - 8) : mark.start()]))
        better = not chains[place][0] or stops > chains[place][1] or (place == 0 and stops == chains[place][1])
        if before[0] == place and better:
            chains[place] = (place + 1, stops, (*before[2], mark))
    return max(chains, key=lambda chain: chain[:2])


def _option(text: str) -> str:
    return text.strip().rstrip(".,;").strip()


def _labels_and_texts(value: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(value, str):
        return [], list(split_options(value))
    if isinstance(value, Mapping):
        if "text" in value:
            texts, labels = value["text"], value.get("label", [])
            matches = isinstance(texts, (list, tuple)) and isinstance(labels, (list, tuple))
            return (list(labels), list(texts)) if matches and len(labels) in (0, len(texts)) else ([], [])
        given = {str(name).strip(): text for name, text in value.items() if text is not None}
        for labels in (LETTERS, LETTERS.lower(), "0123456789", [*"123456789", "10"]):
            if set(given) == set(labels[: len(given)]):
                return list(labels[: len(given)]), [given[label] for label in labels[: len(given)]]
        return [], []
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(entry, Mapping) and "text" in entry for entry in value):
            labels = [entry["label"] for entry in value if "label" in entry]
            return labels if len(labels) == len(value) else [], [entry["text"] for entry in value]
        return [], list(value)
    return [], []


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return str(value).strip()


def _unlettered(text: str) -> tuple[str, str]:
    """Return a choice without its letter, and the letter; "" for none."""
    match = _LEADING.match(text)
    return (text[match.end() :].strip(), match[1].upper()) if match else (text, "")


def _folded(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
