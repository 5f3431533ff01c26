"""Transcripts in another language than stated are found, and those of the stated one are left alone."""

from __future__ import annotations

import pytest

from megatron_cord.speech.recordings.language import language_code, language_fault

SENTENCES = {
    "en": ["What is twelve plus seven?", "How do I get to the railway station from here?", "seven apples plus five"],
    "de": ["Wie komme ich von hier zum Bahnhof?", "Was ergibt zwölf plus sieben zusammengerechnet?"],
    "fr": ["Comment puis-je aller à la gare d'ici ?", "Combien font douze plus sept, s'il vous plaît ?"],
    "es": ["¿Cómo puedo llegar a la estación de tren desde aquí?", "¿Cuánto es doce más siete, por favor?"],
    "zh": ["从这里到火车站怎么走，需要多长时间才能到达那里呢？请你告诉我一下"],
    "ru": ["Как мне пройти отсюда до вокзала?"],
    "ja": ["ここから駅までどうやって行けばいいですか、教えてください。"],
}  # fmt: skip


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences(language: str) -> None:
    """Would catch good transcripts that are left out, and ones of another script or language that pass."""
    for sentence in SENTENCES[language]:
        assert language_fault(sentence, language) is None
        assert language_fault(sentence, f"{language}-XX") is None
    longest = max(SENTENCES[language], key=len)
    for other in {"en", "de", "ja"} - {language}:
        assert (language_fault(longest, other) or "").startswith("its transcript is not in the language stated")


def test_too_short_to_tell_and_unknown() -> None:
    """Would catch a guess on two words, and a language without a detector that leaves out its whole set."""
    assert language_fault("Nein, danke.", "en") is None and language_fault("12 + 7 = 19", "de") is None
    assert language_fault("Wie komme ich von hier zum Bahnhof?", "gsw") is None
    assert language_code("English") == "en" and language_code("pt_BR") == "pt" and language_code("no idea") is None
