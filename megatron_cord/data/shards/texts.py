"""The JSON beside the recordings: what a sample's texts must be like.

A sample is ``question``, the words of its one recording, or ``turns`` (`megatron_cord.data.turns`), whose references
are the recordings' numbers.
"""

from __future__ import annotations

from typing import Any

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.fields import NOTES, find_unused, listed, read_row
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import Turn, TurnsError, read_turns, recordings_of
from megatron_cord.errors import CordError

_TEXTS = ("answer", "solution", "voice", "system", "instruction")  # text or null
_PROMPTS = ("system", "instruction")  # not empty
_FIELDS = ("id", "question", "choices", "turns", *_TEXTS)
_MOST_RECORDINGS = 1000


def read_sample(content: bytes, key: str, where: str) -> Sample:
    """Read a sample's JSON object; its recordings stay empty.

    Args:
        content: of the file.
        key: the name of the sample's files.
        where: names the sample in errors.

    Raises:
        CordError: it is none, has neither a question nor turns or both, has another id than the files' name, or a
            field that nothing uses.
    """
    try:
        texts = read_row(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CordError(f"{where}: its text is not JSON in UTF-8 ({error}); write it again") from error
    if not isinstance(texts, dict):
        raise CordError(f'{where}: its JSON is no object; write {{"question": ...}}')
    turns = _turns(texts, where)
    question = texts.get("question")
    if not turns and (not isinstance(question, str) or not question.strip()):
        raise CordError(
            f'{where} has no text: its JSON needs a "question" (its fields: {listed(texts)}); add it or remove the '
            "sample"
        )
    for name in _TEXTS:
        if not isinstance(texts.get(name), (str, type(None))):
            raise CordError(f"{where}: {name} is {texts[name]!r}; write text or leave it out")
    for name in _PROMPTS:
        if texts.get(name) is not None and not texts[name].strip():
            raise CordError(f"{where}: {name} is empty; write text or leave it out")
    choices = texts.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise CordError(f"{where}: its choices are {choices!r:.80}, no list of texts; write one or leave them out")
    given = texts.get("id")
    if given is not None and (isinstance(given, bool) or str(given) not in (key, key.rpartition("/")[2])):
        raise CordError(f"{where}: its JSON has the id {given!r:.80}, its files have the name {key!r}; make them agree")
    if (unused := find_unused(texts, _FIELDS)) is not None:
        raise CordError(f"{where}: {unused}")
    return Sample(
        id=key,
        question=question or "",
        sampling_rate=SAMPLING_RATE,
        answer=texts.get("answer"),
        solution=texts.get("solution"),
        voice=texts.get("voice"),
        choices=tuple(choices or ()),
        instruction=texts.get("instruction"),
        system=texts.get("system"),
        turns=turns,
        metadata=_metadata(texts),
    )


def _metadata(texts: dict[str, Any]) -> dict[str, Any]:
    """Return the notes; those that are no object stay unread, as nothing can name what is in them."""
    notes = texts.get(NOTES)
    return notes if isinstance(notes, dict) else {}


def _turns(texts: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if texts.get("turns") is None:
        return ()
    if both := [name for name in ("question", "instruction") if texts.get(name) is not None]:
        raise CordError(f"{where}: its JSON has turns and {both[0]}; write all texts into the turns")
    try:
        turns = read_turns(texts["turns"], _number)
    except TurnsError as error:
        raise CordError(f"{where}: {error}") from None
    numbers = recordings_of(turns)
    if missing := set(range(max(numbers))) - numbers:
        raise CordError(f"{where}: its turns leave out recording {min(missing)}; number them from 0, without gaps")
    return turns


def _number(reference: Any) -> int:
    if type(reference) is not int or not 0 <= reference < _MOST_RECORDINGS:
        raise TurnsError(f'"audio" is {reference!r:.60}; write the number of a recording: 0, 1, …')
    return reference
