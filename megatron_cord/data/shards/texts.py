"""The JSON beside a recording: what a sample's texts must be like."""

from __future__ import annotations

from typing import Any

from megatron_cord.data.fields import find_unused, listed, read_row
from megatron_cord.errors import CordError

_TEXTS = ("answer", "solution", "voice")  # text or null
_FIELDS = ("id", "question", "choices", *_TEXTS)


def read_texts(content: bytes, key: str, where: str) -> dict[str, Any]:
    """Read a sample's JSON object: a question, and texts or null.

    Args:
        content: of the file.
        key: the name of the sample's files.
        where: names the sample in errors.

    Raises:
        CordError: it is none, lacks a question, has another id than the files' name, or a field that nothing uses.
    """
    try:
        texts = read_row(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CordError(f"{where}: its text is not JSON in UTF-8 ({error}); write it again") from error
    if not isinstance(texts, dict):
        raise CordError(f'{where}: its JSON is no object; write {{"question": ...}}')
    question = texts.get("question")
    if not isinstance(question, str) or not question.strip():
        raise CordError(
            f'{where} has no text: its JSON needs a "question" (its fields: {listed(texts)}); add it or remove the '
            "sample"
        )
    for name in _TEXTS:
        if not isinstance(texts.get(name), (str, type(None))):
            raise CordError(f"{where}: {name} is {texts[name]!r}; write text or leave it out")
    choices = texts.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise CordError(f"{where}: its choices are {choices!r:.80}, no list of texts; write one or leave them out")
    given = texts.get("id")
    if given is not None and (isinstance(given, bool) or str(given) not in (key, key.rpartition("/")[2])):
        raise CordError(f"{where}: its JSON has the id {given!r:.80}, its files have the name {key!r}; make them agree")
    if (unused := find_unused(texts, _FIELDS)) is not None:
        raise CordError(f"{where}: {unused}")
    return texts
