"""Shards of conversations: several recordings a sample, system prompts and instructions, and what can be wrong."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.data.samples import HEAR, READ, PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.errors import CordError
from tests.data.shards.shard_files import AUDIO, tar, text, wav

TURNS = (
    Turn("user", (TextPart("Listen."), AudioPart(0, "what is this"))),
    Turn("assistant", (TextPart("A dog."),)),
    Turn("user", (AudioPart(1, "and this"), AudioPart(2, "or that"), TextPart("Be brief."))),
)
CLIPS = [AUDIO, -AUDIO[:200], AUDIO[:100] * 0.5]
CHAT = Sample("c", "", answer="a cat", system="You hear well.", turns=TURNS).with_recordings(CLIPS)
BESIDE = Sample("b", "what is it", AUDIO, instruction="Answer with one word.", system="Be brief.")
PLAIN = Sample("p", "what is it", AUDIO, answer="4", voice="v")


def write(directory: Path, *samples: Sample) -> Path:
    writer = ShardWriter(directory)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return directory


def names(shard: Path) -> list[str]:
    with tarfile.open(shard) as file:
        return sorted(file.getnames())


def test_a_conversation_comes_back(tmp_path: Path) -> None:
    """Catches recordings in another order, turns that are lost, and a question that is not the last turn's."""
    dataset = ShardDataset(write(tmp_path, CHAT, BESIDE, PLAIN))
    assert names(tmp_path / "shard-000000.tar") == [
        "b.json", "b.wav", "c.0.wav", "c.1.wav", "c.2.wav", "c.json", "p.json", "p.wav"
    ]  # fmt: skip
    chat, beside, plain = (dataset[i] for i in range(3))
    assert (chat.turns, chat.system, chat.answer) == (TURNS, "You hear well.", "a cat")
    assert chat.question == chat.asked == "and this\nor that\nBe brief."
    for recording, expected in zip(chat.recordings, CLIPS, strict=True):
        assert np.abs(recording - expected).max() <= 0.5 / 32767 + 1e-7
    assert len(chat.played()) == sum(map(len, CLIPS)) + 2 * 8000
    assert (beside.question, beside.instruction, beside.system) == ("what is it", "Answer with one word.", "Be brief.")
    assert beside.asked == "what is it\nAnswer with one word." and plain.asked == "what is it"
    written = dataset.without_audio(0)
    assert written.turns == TURNS and not written.waveform.size and written.num_recordings == 3
    assert dataset.ids == ["c", "b", "p"]


def test_a_plain_sample_is_written_as_before(tmp_path: Path) -> None:
    """Catches a field more or another order in the JSON of samples without a conversation: other checksums."""
    write(tmp_path, PLAIN)
    with tarfile.open(tmp_path / "shard-000000.tar") as file:
        content = file.extractfile("p.json")
        assert content is not None
        assert content.read() == (
            b'{"id": "p", "question": "what is it", "answer": "4", "solution": null, "voice": "v"}'
        )


def test_views_differ_where_audio_stands_for_text() -> None:
    """Catches a system prompt or an instruction that one of student and teacher does not get."""
    hear, read = CHAT.chat(HEAR), CHAT.chat(READ)
    assert hear == (Turn("system", (TextPart("You hear well."),)), *TURNS)
    assert [turn.role for turn in read] == [turn.role for turn in hear]
    assert [turn.parts for turn in read[1:]] == [
        (TextPart("Listen.\nwhat is this"),), (TextPart("A dog."),), (TextPart("and this\nor that\nBe brief."),)
    ]  # fmt: skip
    assert BESIDE.chat(HEAR)[1].parts == (AudioPart(0, "what is it"), TextPart("Answer with one word."))
    assert BESIDE.chat(READ)[1].parts == (TextPart("what is it\nAnswer with one word."),)
    assert PLAIN.chat(READ) == (Turn("user", (TextPart("what is it"),)),)


def test_a_set_completes_its_samples(tmp_path: Path) -> None:
    """Catches a default that replaces what a sample brings, and one that is not part of the data's fingerprint."""
    directory = write(tmp_path, CHAT, BESIDE, PLAIN)
    dataset = ShardDataset(directory, defaults=PromptDefaults("Speak German.", "Translate."))
    found = [(sample.system, sample.instruction) for sample in (dataset[0], dataset[1], dataset.without_audio(2))]
    assert found == [
        ("You hear well.", None), ("Be brief.", "Answer with one word."), ("Speak German.", "Translate.")
    ]  # fmt: skip
    assert dataset.fingerprint != ShardDataset(directory).fingerprint
    with pytest.raises(CordError, match="instruction is empty; write a text, or null"):
        PromptDefaults(instruction=" ")


def turn(*numbers: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"audio": number, "text": "what"} for number in numbers]}]


def chat(*numbers: int, **more: object) -> bytes:
    return json.dumps({"turns": turn(*numbers), **more}).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("k.json", chat(0, 1)), ("k.0.wav", wav())), "sample k lacks its recording 1: its turns have 2"),
        ((("k.json", chat(0, 1)), ("k.wav", wav())), "sample k lacks its recording 1"),
        ((("k.json", chat(0)), ("k.0.wav", wav()), ("k.1.wav", wav())), "sample k has recording 1, which its JSON"),
        ((("k.json", text()), ("k.0.wav", wav()), ("k.1.wav", wav())), "sample k has recording 1, which its JSON"),
        ((("k.json", chat(0, 1)), ("k.0.wav", wav()), ("k.2.wav", wav())), "sample k has the files .* number all"),
        ((("k.json", chat(0, 1)), ("k.wav", wav()), ("k.1.wav", wav())), "sample k has the files .*k.0.wav"),
        ((("k.json", chat(0, 1)), ("k.0.wav", wav()), ("k.0.ogg", wav())), "sample k comes twice"),
        ((("k.json", chat(0, 2)), ("k.0.wav", wav()), ("k.1.wav", wav())), "sample k: its turns leave out recording 1"),
        ((("k.json", chat(0, -1)), ("k.wav", wav())), 'sample k: its turn 1, part 2: "audio" is -1; write the number'),
        ((("k.json", chat(0, question="what")), ("k.wav", wav())), "sample k: its JSON has turns and question"),
        ((("k.json", chat(0, instruction="Be brief.")), ("k.wav", wav())), "its JSON has turns and instruction"),
        ((("k.json", b'{"turns": []}'), ("k.wav", wav())), r"sample k: its turns are \[\]"),
        ((("k.json", chat(0, 1)), ("k.0.wav", wav()), ("k.1.wav", b"")), "sample k, recording 1: not a recording"),
    ],
)
def test_bad_conversations_are_named_at_once(
    tmp_path: Path, members: tuple[tuple[str, bytes], ...], message: str
) -> None:
    """Catches a recording that is missing or left over in silence, and turns that stop a run when their time comes."""
    with pytest.raises(CordError, match=message):
        ShardDataset(tar(tmp_path / "x.tar", *members))


def test_limits_cover_every_part(tmp_path: Path) -> None:
    """Catches a clip or a text that is only looked at in the first recording or the question."""

    def control_token(text: str) -> str | None:
        return "<end>" if "<end>" in text else None

    good = replace(CHAT, id="g")
    cases = {
        "short": CHAT.with_recordings([AUDIO, AUDIO, AUDIO[:50]]),
        "system": replace(CHAT, system="a <end>"),
        "answer": replace(CHAT, turns=(TURNS[0], Turn("assistant", (TextPart("A <end>."),)), TURNS[2])),
        "split": replace(CHAT, turns=(*TURNS[:2], Turn("user", (*TURNS[2].parts, TextPart("<en"), TextPart("d>"))))),
        "beside": replace(BESIDE, instruction="<end>"),
    }
    directory = write(tmp_path, good, *(replace(sample, id=name) for name, sample in cases.items()))
    limits = PromptLimits(shortest=80, longest=330, control_token=control_token)
    dataset = ShardDataset(directory, limits=limits, max_skipped=0.9)
    found = {item.place.rpartition(" ")[2]: item.message.partition(": sample ")[2] for item in dataset.skipped}
    assert dataset.ids == ["g"] and found.keys() == cases.keys()
    assert found["short"].startswith("short has 0.003 s of audio in its recording 2, too short for the encoder")
    for name, part in [
        ("system", "system prompt"),
        ("answer", "turn 2"),
        ("split", "turn 3"),
        ("beside", "instruction"),
    ]:
        assert found[name] == f"{name} has '<end>' in its {part}, a control token of the model; remove it from the text"
    with pytest.raises(CordError, match=r"sample g, recording 0: 0\.02 s of audio, .* \(6 of 6 samples are longer\)"):
        ShardDataset(directory).refuse_longer(250)


def test_dots_in_names_of_conversations(tmp_path: Path) -> None:
    """Catches numbers of recordings taken for a part of a name, and a name's own number for a recording's."""
    members = [
        ("a.v1.json", chat(1, 0)), ("a.v1.1.wav", wav(frames=30)), ("a.v1.0.wav", wav(frames=20)),
        ("b.0.json", text()), ("b.0.wav", wav()), ("b.1.json", text()), ("b.1.wav", wav()),
        ("set/c.json", chat(0)), ("set/c.0.FLAC", wav()),
    ]  # fmt: skip
    dataset = ShardDataset(tar(tmp_path / "x.tar", *members))
    assert dataset.ids == ["a.v1", "b.0", "b.1", "set/c"]
    assert [len(recording) for recording in dataset[0].recordings] == [20, 30]
