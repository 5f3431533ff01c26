"""Read plain text with mathematics in it from left to right: at each place the first rule that matches speaks.

Dates and quantities come first, then words, then mathematics; letters and punctuation that no rule takes stand as they
are. What is spoken is never looked at again.
"""

from __future__ import annotations

from megatron_cord.speech.verbalization.latex import END, START
from megatron_cord.speech.verbalization.rules.dashes import DASHES
from megatron_cord.speech.verbalization.rules.dates_and_times import DATES_AND_TIMES
from megatron_cord.speech.verbalization.rules.operators import OPERATORS
from megatron_cord.speech.verbalization.rules.place import Place
from megatron_cord.speech.verbalization.rules.quantities import QUANTITIES
from megatron_cord.speech.verbalization.rules.values import VALUES
from megatron_cord.speech.verbalization.rules.words import WORDS

RULES = (*DATES_AND_TIMES, *QUANTITIES, *WORDS, *VALUES, *OPERATORS, *DASHES)


def read(text: str) -> str:
    """Return the text in words, with its punctuation.

    Raises:
        UnspeakableError: a number or symbol in it has no sure reading.
    """
    pieces: list[str] = []
    at = 0
    while at < len(text):
        for rule in RULES:
            match = rule.pattern.match(text, at)
            if match is None or match.end() == at:
                continue
            words = rule.speak(Place(text, match))
            if words is not None:
                pieces.append(words)
                at = match.end()
                break
        else:
            pieces.append(" " if text[at] in START + END else text[at])
            at += 1
    return "".join(pieces)
