"""Whether a transcript is in the language that its row states, by py3langid, whose models come with it.

A detector errs on a few words, so a transcript is left out only where it is long enough, another language is likely,
and the stated one next to impossible.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_LETTERS = 20  # fewer are no evidence
_LIKELY, _IMPOSSIBLE = 0.5, 0.001  # probabilities; related languages share theirs


def language_fault(text: str, language: str) -> str | None:
    """Return that a text is in another language than stated; None where it is not, or cannot be decided.

    Args:
        text: any.
        language: a code ("en", "pt-BR"), or an English name ("Portuguese").
    """
    stated = language_code(language)
    if stated is None:
        return f"its language is neither a code, such as en, nor an English name ({language!r})"
    if stated not in known_languages() or sum(map(str.isalpha, text)) < _LETTERS:
        return None
    ranked = dict(_identifier().rank(" ".join(text.split())))
    found = max(ranked, key=lambda code: ranked[code])
    if ranked[found] < _LIKELY or ranked[stated] > _IMPOSSIBLE:
        return None
    return f"its transcript is not in the language stated ({found} in the place of {stated}: {text[:60]!r})"


@cache
def language_code(language: str) -> str | None:
    """Return the first part of a language's code, in lower case; None for what is no language.

    English names are those that Whisper knows.
    """
    name = language.strip().lower()
    if code := re.fullmatch(r"([a-z]{2,3})(?:[-_][a-z0-9_-]+)?", name):
        return code[1]
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # takes seconds

    found: str | None = TO_LANGUAGE_CODE.get(name)
    return found


@cache
def known_languages() -> frozenset[str]:
    """Return the codes of the languages that can be told from others."""
    return frozenset(_identifier().nb_classes)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes half a second, and is needed here alone

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
