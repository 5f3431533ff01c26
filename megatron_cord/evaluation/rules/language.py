"""Sentences, words in capitals and languages, by the libraries of the extra "ifeval"."""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron_cord.errors import CordError


@cache
def _libraries() -> tuple[Any, Any, Any]:
    try:
        import langdetect
        import punkt
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise CordError(
            f"IFEval's instructions are checked with {error.name}, which is not installed; pip install "
            "'megatron-cord[ifeval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws at random else, and the same text may have two languages
    return langdetect, punkt.PunktSentenceTokenizer(punkt.load_model("english")), NLTKWordTokenizer()


def require_libraries() -> None:
    """Raise CordError without the extra, before anything is computed."""
    _libraries()


def count_sentences(text: str) -> int:
    """Return how many sentences NLTK's English Punkt model finds. Raises CordError without the extra."""
    return len(_libraries()[1].tokenize(text))


def capital_words(text: str) -> int:
    """Return how many of NLTK's word tokens are in capitals. Raises CordError without the extra."""
    _, sentences, words = _libraries()
    return sum(word.isupper() for sentence in sentences.tokenize(text) for word in words.tokenize(sentence))


def language_of(text: str) -> str | None:
    """Return the text's language as ISO 639-1 names it; None where it has none. Raises CordError without the extra."""
    langdetect = _libraries()[0]
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None
