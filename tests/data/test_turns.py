"""Turns as rows and shards have them: what is read, what is refused, and how they become one text."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cord.data.turns import AudioPart, TextPart, Turn, TurnsError, read_turns, turns_json, written


def number(reference: Any) -> int:
    if not isinstance(reference, int):
        raise TurnsError(f'"audio" is {reference!r}')
    return reference


def test_turns_come_back_as_they_were_written() -> None:
    """Catches parts out of order, a text that becomes a recording, and null fields, as Parquet has them, refused."""
    value = [
        {"role": "user", "content": [{"text": "First.", "audio": None}, {"audio": 0, "text": "what is this"}]},
        {"role": "assistant", "content": "A dog.", "name": None},
        {"role": "user", "content": ["And", {"audio": 1, "text": "that"}]},
    ]
    turns = read_turns(value, number)
    assert turns == (
        Turn("user", (TextPart("First."), AudioPart(0, "what is this"))),
        Turn("assistant", (TextPart("A dog."),)),
        Turn("user", (TextPart("And"), AudioPart(1, "that"))),
    )
    assert turns_json(turns)[1] == {"role": "assistant", "content": "A dog."}
    assert read_turns(turns_json(turns), number) == turns


USER = {"role": "user", "content": [{"audio": 0, "text": "what"}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("what", "its turns are 'what', no list of"),
        ([], r"its turns are \[\], no list"),
        (["what"], "its turn 1 is 'what'; write"),
        ([{"role": "system", "content": "Be brief."}, USER], 'its turn 1 has the role "system"; .*field "system"'),
        ([{"role": "tool", "content": "x"}, USER], "its turn 1 has the role 'tool'; write user or assistant"),
        ([USER | {"weight": 1}], "its turn 1 has the field 'weight', which nothing uses"),
        ([{"role": "user"}], "its turn 1 has the content None; write a text or a list of parts"),
        ([{"role": "user", "content": []}], r"its turn 1 has the content \[\]; write"),
        ([USER, {"role": "user", "content": " "}], "its turn 2, part 1 has no text in"),
        ([{"role": "user", "content": [{"audio": 0}]}], 'its turn 1, part 1 has no transcript in "text" but None'),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "its turn 1, part 1 has the field 'type'"),
        ([{"role": "user", "content": [{"audio": "a.wav", "text": "x"}]}], "turn 1, part 1: \"audio\" is 'a.wav'"),
        ([{"role": "user", "content": [5]}], "its turn 1, part 1 is 5; a part is"),
        ([USER, {"role": "assistant", "content": "4"}], "its last turn is the assistant's; end with the user's"),
        ([{"role": "user", "content": "what"}], "its turns have no recording"),
    ],
)
def test_what_is_not_understood_is_named(value: Any, message: str) -> None:
    """Catches a turn, a part or a field that is dropped in silence, and an error that does not say where."""
    with pytest.raises(TurnsError, match=message):
        read_turns(value, number)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([AudioPart(0, "what is it")], "what is it"),
        ([TextPart("a"), TextPart("b")], "ab"),
        ([TextPart("Listen:"), AudioPart(0, "what"), TextPart("Be brief.")], "Listen:\nwhat\nBe brief."),
        ([TextPart("Listen: "), AudioPart(0, "what"), TextPart("\nBe brief.")], "Listen: what\nBe brief."),
        ([AudioPart(0, "one"), AudioPart(1, "two")], "one\ntwo"),
        ([AudioPart(0, ""), TextPart("What do you hear?")], "What do you hear?"),
    ],
)
def test_transcripts_stand_apart_from_text(parts: list[AudioPart | TextPart], text: str) -> None:
    """Catches a transcript that runs into the instruction, and texts that are changed though no recording is near."""
    assert written(parts) == text
