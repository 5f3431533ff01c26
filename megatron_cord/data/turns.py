"""Conversations as samples have them: turns of parts, each a text or a recording with its transcript.

In rows and in shards alike, ``turns`` is a list of ``{"role": "user" | "assistant", "content": CONTENT}``. CONTENT is a
text, or a list of parts: a text, ``{"text": …}``, or ``{"audio": REFERENCE, "text": TRANSCRIPT}``. What a reference is
(a path, a number) is the caller's matter. The last turn is the user's. A field without a value, null, counts as not
written, as Parquet gives every object every field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

_ROLES = ("user", "assistant")  # in ``turns``: a system prompt is a field of its own
_FORM = 'a part is a text, {"text": …} or {"audio": …, "text": transcript}'
_SHOWN = 60  # characters of what is refused


class TurnsError(ValueError):
    """Why turns cannot be used; the message begins with "its"."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a turn, as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class AudioPart:
    """A recording in a turn.

    Attributes:
        recording: its number among the sample's recordings, from 0.
        transcript: what is said in it; "" for a sound without words, of which no text view can be made.
    """

    recording: int
    transcript: str


Part = TextPart | AudioPart


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation: its role, and its parts in order."""

    role: Role
    parts: tuple[Part, ...]


def read_turns(value: Any, number: Callable[[Any], int]) -> tuple[Turn, ...]:
    """Read turns from JSON.

    Args:
        value: of the field ``turns``.
        number: returns the number of the recording that a reference means; it raises TurnsError, with what is wrong
            with the reference, for one that means none.

    Raises:
        TurnsError: they have another form, an empty text, no recording, or do not end with the user's.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise TurnsError(f'its turns are {_shown(value)}, no list of {{"role": …, "content": …}}')
    turns = tuple(_turn(turn, f"its turn {i}", number) for i, turn in enumerate(value, 1))
    if turns[-1].role != "user":
        raise TurnsError("its last turn is the assistant's; end with the user's, which the model is to answer")
    if not recordings_of(turns):
        raise TurnsError("its turns have no recording; a sample needs at least one")
    return turns


def turns_json(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """Return what `read_turns` reads, with the recordings' numbers as references."""
    return [{"role": turn.role, "content": _content_json(turn.parts)} for turn in turns]


def recordings_of(turns: Iterable[Turn]) -> set[int]:
    """Return the numbers of the recordings that turns refer to."""
    return {part.recording for turn in turns for part in turn.parts if isinstance(part, AudioPart)}


def written(parts: Sequence[Part]) -> str:
    """Return parts as one text, with transcripts in the place of recordings.

    Between a transcript and what is beside it stands a line break, unless there is white space already: chat templates
    set recordings apart from text by marks, which a transcript has not.
    """
    text, after_transcript = "", False
    for part in parts:
        is_transcript = isinstance(part, AudioPart)
        more = part.transcript if isinstance(part, AudioPart) else part.text
        touches = text and more and not (text[-1].isspace() or more[0].isspace())
        text += f"\n{more}" if touches and (is_transcript or after_transcript) else more
        after_transcript = is_transcript
    return text


def _turn(value: Any, what: str, number: Callable[[Any], int]) -> Turn:
    if not isinstance(value, dict):
        raise TurnsError(f'{what} is {_shown(value)}; write {{"role": …, "content": …}}')
    given = {name: entry for name, entry in value.items() if entry is not None}
    if unknown := sorted(map(str, given.keys() - {"role", "content"})):
        raise TurnsError(f"{what} has the field {unknown[0]!r}, which nothing uses; a turn has role and content")
    role = given.get("role")
    if role == "system":
        raise TurnsError(f'{what} has the role "system"; write the system prompt into the sample\'s field "system"')
    if role not in _ROLES:
        raise TurnsError(f"{what} has the role {_shown(role)}; write user or assistant")
    content = given.get("content")
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TurnsError(f"{what} has the content {_shown(content)}; write a text or a list of parts: {_FORM}")
    return Turn(
        "user" if role == "user" else "assistant",
        tuple(_part(part, f"{what}, part {i}", number) for i, part in enumerate(parts, 1)),
    )


def _part(value: Any, what: str, number: Callable[[Any], int]) -> Part:
    given = {"text": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise TurnsError(f"{what} is {_shown(value)}; {_FORM}")
    given = {name: entry for name, entry in given.items() if entry is not None}
    if unknown := sorted(map(str, given.keys() - {"audio", "text"})):
        raise TurnsError(f"{what} has the field {unknown[0]!r}; {_FORM}")
    text = given.get("text")
    if not isinstance(text, str) or not text.strip():
        missing = "no transcript" if "audio" in given else "no text"
        raise TurnsError(f'{what} has {missing} in "text" but {_shown(text)}; {_FORM}')
    if "audio" not in given:
        return TextPart(text)
    try:
        return AudioPart(number(given["audio"]), text)
    except TurnsError as error:
        raise TurnsError(f"{what}: {error}") from None


def _content_json(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return [
        {"text": part.text} if isinstance(part, TextPart) else {"audio": part.recording, "text": part.transcript}
        for part in parts
    ]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
