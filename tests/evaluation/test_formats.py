"""Question sets in each published layout, made here with the documented fields, and rows that are wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.turns import AudioPart
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import Format, SetConfig
from megatron_cord.evaluation.formats import load_set
from megatron_cord.evaluation.questions import Question
from tests.tiny_run import make_samples, write_shards


def recording(seconds: float = 0.5, rate: int = 24000, channels: int = 1, kind: str = "WAV") -> bytes:
    tone = 0.4 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(tone[:, None], channels, axis=1), rate, format=kind)
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, format: Format = "plain", **more: Any) -> tuple[list[Question], dict[str, str]]:
    found = load_set(SetConfig(str(path), format, **more))
    return list(found.questions), {reject.id: reject.reason for reject in found.rejects}


@pytest.mark.parametrize(
    ("rate", "channels", "kind"),
    [(24000, 1, "WAV"), (44100, 2, "WAV"), (48000, 2, "FLAC"), (24000, 1, "MP3"), (16000, 1, "OGG")],
)
def test_recordings_of_any_kind(rate: int, channels: int, kind: str) -> None:
    """Catches stereo read as twice the length, another rate kept as it is, and formats that benchmarks come in."""
    audio = decode_audio(recording(0.5, rate, channels, kind), "x")
    assert audio.dtype == np.float32 and abs(len(audio) - 8000) < 1500 and np.abs(audio).max() <= 1.0
    spectrum = np.abs(np.fft.rfft(audio))
    assert abs(np.argmax(spectrum) * 16000 / len(audio) - 300) < 5


def test_bad_recordings_are_named() -> None:
    """Catches a crash on what is no audio, a recording of no length, and one of hours."""
    for content, fault in [
        (b"no audio", "not a recording"),
        (recording()[:30], "not a recording"),
        (recording(0.0), "no samples"),
        (b"", "not a rec"),
    ]:
        with pytest.raises(CordError, match=f"^clip: .*{fault}"):
            decode_audio(content, "clip")


def test_plain(tmp_path: Path) -> None:
    """Catches choices missing from the text, a gold text not found among them, and paths from another folder."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(recording())
    rows: list[dict[str, Any]] = [
        {
            "id": "a",
            "question": "Which is a metal?",
            "choices": ["iron", "wood"],
            "answer": "wood",
            "audio": "clips/a.wav",
            "group": "x",
        },
        {
            "id": "b",
            "audio": "clips/a.wav",
            "instruction": "What do you hear?",
            "choices": ["a dog", "a tone"],
            "answer": "B",
        },
        {"question": "2 + 2?", "answer": 4},
        {"id": "c", "question": "Which?", "choices": ["iron", "wood"], "answer": "glass"},
        {"id": "d", "question": "Which?"},
        {"id": "a", "question": "Again?", "answer": "1"},
        {"id": "e", "answer": "1"},
        {"id": "f", "question": "Which?", "choices": "iron", "answer": "iron"},
        {"id": "g", "audio": 5, "answer": "1"},
        {"id": "h", "audio": "gone.wav", "answer": "1"},
    ]
    questions, rejects = load(write_rows(tmp_path / "set.jsonl", rows))
    a, b, sum_, h = questions
    assert (a.text, a.answer, a.group, a.choices) == ("Which is a metal? A. iron. B. wood.", "B", "x", ("iron", "wood"))
    assert (b.text, b.instruction, b.answer) == (None, "What do you hear? A. a dog. B. a tone.", "B")
    assert (sum_.id, sum_.answer, sum_.audio) == ("line-3", "4", None)
    assert len(a.sample().waveform) == 8000 and b.sample().instruction == b.instruction
    with pytest.raises(CordError, match=r"gone\.wav: cannot be read"):
        h.sample()
    assert "none of its choices" in rejects["c"] and rejects["d"] == "it has no answer (its fields: id, question)"
    assert rejects["a"] == "its id comes twice" and "neither text nor recording" in rejects["e"]
    assert "not 2 to 10 texts" in rejects["f"] and "neither a path nor bytes" in rejects["g"]
    (moved := tmp_path / "elsewhere").mkdir()
    moved_set = write_rows(moved / "set.json", rows[:1])
    assert load(moved_set, audio_root=str(tmp_path))[0][0].sample().waveform.any()


def test_conversations(tmp_path: Path) -> None:
    """Catches turns whose recordings are mixed up, choices that are not offered, and defaults over what a row has."""
    for name, seconds in (("a", 0.25), ("b", 0.5)):
        (tmp_path / f"{name}.wav").write_bytes(recording(seconds))
    last = [{"audio": "b.wav", "text": "and this"}, {"audio": "a.wav", "text": "what is it"}]
    turns = [
        {"role": "user", "content": [{"audio": "a.wav", "text": "what is it"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": last},
    ]
    rows: list[dict[str, Any]] = [
        {"id": "chat", "turns": turns, "answer": "cat", "choices": ["dog", "cat"], "system": "You hear animals."},
        {"id": "plain", "question": "What?", "audio": "a.wav", "answer": "1"},
        {"id": "own", "question": "What?", "audio": "a.wav", "answer": "1", "instruction": "In one word."},
        {"id": "both", "question": "What?", "turns": turns, "answer": "1"},
        {"id": "open", "turns": turns[:2], "answer": "1"},
    ]
    path = write_rows(tmp_path / "set.jsonl", rows)
    questions, rejects = load(path, system="Be brief.", instruction="Answer.")
    chat, plain, own = (question.sample() for question in questions)
    assert [len(clip) for clip in chat.recordings] == [4000, 8000]
    assert chat.asked == "and this\nwhat is it\nA. dog. B. cat." and questions[0].answer == "B"
    assert [part.recording for part in chat.turns[2].parts if isinstance(part, AudioPart)] == [1, 0]
    assert [sample.system for sample in (chat, plain, own)] == ["You hear animals.", "Be brief.", "Be brief."]
    assert [sample.instruction for sample in (chat, plain, own)] == [None, "Answer.", "In one word."]
    assert plain.asked == questions[1].asked == "What?\nAnswer."
    assert rejects["both"] == "it has turns and question; write all texts and recordings into the turns"
    assert "its last turn is the assistant's" in rejects["open"]
    with pytest.raises(CordError, match="system is empty; write a text, or null for none"):
        SetConfig(str(path), system="")


@pytest.mark.parametrize(
    ("format", "row", "field"),
    [
        ("plain", {"question": "What?", "answer": "1", "context": "Iron rusts."}, "context"),
        ("plain", {"question": "What?", "answer": "1", "anwser": "2"}, "anwser"),
        ("gsm8k", {"question": "What?", "answer": "1", "instruction": "Sum up."}, "instruction"),
        ("big_bench_audio", {"transcript": "What?", "official_answer": "1", "system": "Be brief."}, "system"),
    ],
)
def test_a_field_that_nothing_uses_is_refused(tmp_path: Path, format: Format, row: dict[str, Any], field: str) -> None:
    """Catches a question that is asked otherwise than its set asks it, in silence."""
    path = write_rows(tmp_path / "set.jsonl", [row | {"metadata": {"level": 3}}])
    with pytest.raises(CordError, match=rf"set\.jsonl, line 1: its field '{field}' is used by nothing here .*ignore"):
        load(path, format)
    assert len(load(path, format, ignore=(field,))[0]) == 1


def test_settings_of_a_set_that_nothing_uses_are_refused() -> None:
    """Catches audio_root given for shards, which hold their audio."""
    for more in ({"audio_root": "x"}, {"ignore": ("x",)}):
        with pytest.raises(CordError, match="of no use to a set of format shards"):
            SetConfig("x", "shards", **more)
    with pytest.raises(CordError, match=r"choose from a set on the hub \(hf://OWNER/NAME\); x is none"):
        SetConfig("x", split="test")


def test_saved_data_sets_with_recordings(tmp_path: Path) -> None:
    """Catches an Audio column that is decoded by another decoder, or lost, and cache files read as questions."""
    rows = [
        {"question": f"What is {i}?", "answer": str(i), "audio": {"bytes": recording(), "path": None}} for i in (1, 2)
    ]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=16000))
    data.save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / "cache-0123.arrow").write_bytes(b"of map")
    questions, rejects = load(tmp_path / "set")
    assert [q.text for q in questions] == ["What is 1?", "What is 2?"] and not rejects
    assert [len(q.sample().waveform) for q in questions] == [8000, 8000]


def test_voicebench(tmp_path: Path) -> None:
    """Catches letters without texts, and audio that lies in the row."""
    prompt = "Which of these is a metal? A. iron B. dry wood C. water D. air"
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "reference": "A", "audio": {"bytes": recording(), "path": "0.wav"}},
        {
            "prompt": "Without options that can be told",
            "reference": "D",
            "audio": {"bytes": recording(), "path": "1.wav"},
        },
        {"prompt": prompt, "reference": "E", "audio": {"bytes": recording(), "path": "2.wav"}},
    ]
    questions, rejects = load(write_rows(tmp_path / "obqa.parquet", rows), "voicebench")
    assert (
        questions[0].choices == ("iron", "dry wood", "water", "air")
        and questions[0].text == prompt
        and questions[0].answer == "A"
    )
    assert questions[1].choices == ("", "", "", "") and questions[1].answer == "D"
    assert len(questions[0].sample().waveform) == 8000
    assert "none of its choices, nor a letter up to D" in rejects["row-3"]


def test_gsm8k(tmp_path: Path) -> None:
    """Catches a whole solution taken for the answer, and thousands with commas."""
    rows: list[dict[str, Any]] = [
        {
            "question": "How many?",
            "answer": "She has 40 + 2.\n#### 1,042",
            "audio": {"bytes": recording(), "path": None},
        },
        {"question": "How many?", "answer": "7"},
    ]
    questions, _ = load(write_rows(tmp_path / "gsm8k.parquet", rows), "gsm8k")
    assert (
        [q.answer for q in questions] == ["1042", "7"] and questions[0].audio is not None and questions[1].audio is None
    )


def test_mmau(tmp_path: Path) -> None:
    """Catches a question that is taken for the text of the recording: there is nothing to read in its place."""
    (tmp_path / "test-mini-audios").mkdir()
    (tmp_path / "test-mini-audios" / "x.wav").write_bytes(recording(rate=48000, channels=2))
    row = {
        "id": "x", "audio_id": "./test-mini-audios/x.wav", "question": "What is it?", "choices": ["Man", "Bell"],
        "answer": "Bell", "task": "sound", "split": "test-mini", "category": "Reasoning", "sub-category": "s",
        "difficulty": "medium",
    }  # fmt: skip
    (question,), _ = load(write_rows(tmp_path / "mmau-test-mini.json", [row]), "mmau")
    assert (question.text, question.answer, question.group) == (None, "B", "sound")
    assert question.instruction == "What is it? A. Man. B. Bell." and len(question.sample().waveform) == 8000


def test_big_bench_audio(tmp_path: Path) -> None:
    """Catches "valid" that is found in "invalid", and numbers that are taken for choices."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "question_0.mp3").write_bytes(recording(kind="MP3"))
    common: dict[str, Any] = {"file_name": "data/question_0.mp3"}
    rows: list[dict[str, Any]] = [
        common
        | {"id": 0, "category": "formal_fallacies", "official_answer": "invalid", "transcript": "Is this valid?"},
        common | {"id": 1, "category": "object_counting", "official_answer": "8"},
        common | {"id": 2, "category": "navigate", "official_answer": "No"},
    ]
    questions, _ = load(write_rows(tmp_path / "metadata.jsonl", rows), "big_bench_audio")
    assert [(q.id, q.answer, q.choices, q.text) for q in questions] == [
        ("0", "B", ("valid", "invalid"), "Is this valid?"), ("1", "8", (), None), ("2", "B", ("Yes", "No"), None),
    ]  # fmt: skip
    assert questions[2].sample().waveform.any()


def test_shards(tmp_path: Path) -> None:
    """Catches answers of other samples than the recordings, and a set that is read into memory."""
    samples = make_samples(7)
    write_shards(tmp_path / "set", samples)
    questions, _ = load(tmp_path / "set", "shards", samples=5)
    assert [(q.id, q.answer, q.text, q.group) for q in questions] == [
        (s.id, s.answer, s.question, s.voice) for s in samples[:5]
    ]
    assert np.allclose(questions[3].sample().waveform, samples[3].waveform, atol=1e-4)


def test_sets_of_nothing_are_named(tmp_path: Path) -> None:
    """Catches an evaluation of no question that ends well."""
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "?"}])
    with pytest.raises(CordError, match=r"has no usable question; the first row, line-1: it has no answer"):
        load(path)
    with pytest.raises(CordError, match="no such file"):
        load(tmp_path / "gone.jsonl")
    (tmp_path / "bad.json").write_bytes(b"[1, 2")
    with pytest.raises(CordError, match=r"bad\.json is not JSON"):
        load(tmp_path / "bad.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=6,
)
NAMES = [
    "question", "audio", "choices", "answer", "instruction", "group", "id", "prompt", "reference", "audio_id", "task",
    "category", "official_answer", "file_name", "transcript", "turns", "system", "choice_a", "choice_b", "answer_gt",
    "audio_path",
]  # fmt: skip


@settings(max_examples=300, deadline=3000)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6), min_size=1, max_size=4),
    format=st.sampled_from([name for name in get_args(Format) if name not in ("shards", "voicebench/ifeval")]),
)
def test_any_row_is_a_question_or_a_reject(
    rows: list[dict[str, Any]], format: Format, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches a row of odd types that ends an evaluation in a traceback."""
    path = write_rows(tmp_path_factory.getbasetemp() / "fuzzed.jsonl", rows)
    try:
        found = load_set(SetConfig(str(path), format))
    except CordError:
        return
    assert len(found.questions) + len(found.rejects) == len(rows)
    for question in found.questions:
        if question.audio is not None:
            with pytest.raises(CordError):
                question.sample()
