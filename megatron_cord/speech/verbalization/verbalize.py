r"""Turn written questions into words that can be spoken: "$\frac{1}{2} + 3$" is "one half plus three".

Four passes: markup is removed (`markup`), LaTeX becomes plain mathematics (`latex`), the whole is read from left to
right (`reader`), where each number and symbol is read by exactly one rule, and what is left must be letters and
punctuation. What a listener could take for another question (code, tables, pictures, addresses, "1/2/2024", a hyphen
that may be a minus) is refused with its reason: student and teacher must be asked the same.

What it simplifies: English.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.latex import plain_mathematics
from megatron_cord.speech.verbalization.markup import without_markup
from megatron_cord.speech.verbalization.reader import read

_PUNCTUATION = set(".,;:?!'-")


def verbalize(text: str, *, max_characters: int = 2000) -> str:
    r"""Return the text as words for a voice.

    Args:
        text: a question, with HTML, Markdown or LaTeX in it or not.
        max_characters: longer texts are refused, as a listener cannot follow them.

    Returns:
        One line of words and punctuation, without digits and symbols.

    Raises:
        UnspeakableError: with the reason.
        CordError: the text needs the normaliser of the extra ``speech``, which is not installed.
    """
    if not any(character.isalnum() for character in text):
        raise UnspeakableError("it has no words")
    if len(text) > max_characters:
        raise UnspeakableError(f"it has {len(text)} characters, more than {max_characters}")
    spoken = _tidy(read(plain_mathematics(without_markup(text))))
    _refuse_other_characters(spoken)
    if not any(character.isalpha() for character in spoken):
        raise UnspeakableError("it has no words")
    return spoken


def _tidy(words: str) -> str:
    words = re.sub(r"\s+(?=[.,;:?!])", "", " ".join(words.split()))
    return re.sub(r"^[\s,.;:]+|,+(?=[.,;:?!])|[\s,]+$", "", re.sub(r"\s*-\s*", "-", words))


def _refuse_other_characters(text: str) -> None:
    for character in text:
        if character.isspace() or character in _PUNCTUATION:
            continue
        name = unicodedata.name(character, f"U+{ord(character):04X}")
        if not character.isalpha():
            raise UnspeakableError(f"it contains {character!r} ({name.lower()})")
        if not name.startswith("LATIN"):
            raise UnspeakableError(f"it contains letters of another script ({name.split()[0].lower()})")
