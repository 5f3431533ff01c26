"""Files of written questions: broken rows are named, and all formats give the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cord.data.question_files import question_files, read_questions
from megatron_cord.errors import CordError
from tests.speech.questions import write_questions


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Would catch one bad line that ends the work, or that vanishes without a word."""
    file = tmp_path / "questions.jsonl"
    rows = [
        b'{"question": "Which is a metal?", "choices": ["iron", "wood"], "answer": "wood"}',
        b'{"question": "Which?", "choices": ["iron", "wood"], "answer": "glass"}',
        b'{"question": "caf\xe9"}',
        b"not json",
        b"[1]",
        b'{"text": "no question"}',
        b'{"id": "a", "question": "What?", "answer": 4}',
        b'{"id": "a", "question": "What again?"}',
        b'{"id": "../x", "question": "What?"}',
        b'{"id": "b", "question": "What?", "answer": [1]}',
        b'{"id": "c", "question": "What?", "choices": ["half of a smile \\uD83D", "none"]}',
        b'{"id": "d", "question": "What is \\ud83d\\ude00?"}',
    ]
    file.write_bytes(b"\n".join(rows))
    questions, rejects = read_questions(file)
    assert [(q.id, q.text, q.answer) for q in questions] == [
        ("line-1", "Which is a metal? A. iron. B. wood.", "B"),
        ("a", "What?", "4"),
        ("d", "What is \U0001f600?", None),
    ]
    reasons = {r.id: r.reason for r in rejects}
    assert (
        "none of its choices" in reasons["line-2"] and "UTF-8" in reasons["line 3"] and "not JSON" in reasons["line 4"]
    )
    assert "no JSON object" in reasons["line 5"] and "its fields: text" in reasons["line-6"] and "twice" in reasons["a"]
    assert "other characters" in reasons["line 9"] and "'answer'" in reasons["b"]
    assert "lone surrogate ('\\ud83d')" in reasons["line 11"]
    file.write_text("")
    with pytest.raises(CordError, match="no usable question"):
        read_questions(file)


def test_parquet_and_jsonl_ask_the_same(tmp_path: Path) -> None:
    """Would catch a Parquet reader that loses rows, order or answers."""
    lines = write_questions(tmp_path / "q.jsonl", 5)
    pq.write_table(
        pa.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()]), tmp_path / "q.parquet"
    )
    assert read_questions(tmp_path / "q.parquet") == read_questions(lines)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CordError, match=r"broken\.parquet cannot be read"):
        read_questions(tmp_path / "broken.parquet")


ROWS = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i), "audio": None} for i in range(4)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("audio", "clips/a.wav"), ("path", "a"), ("speech", {"bytes": b"", "path": None}), ("recording", "x/b.FLAC")],
)
def test_recordings_are_not_replaced_by_a_synthesizer(tmp_path: Path, field: str, value: object) -> None:
    """Catches a data set of recordings that is read for its text and spoken anew by a robot."""
    data = pa.Table.from_pylist([{"question": "What?", field: None}, {"question": "What?", field: value}])
    pq.write_table(data, tmp_path / "q.parquet")
    with pytest.raises(CordError, match=rf"q\.parquet, row 2: its field '{field}' is a recording, .*--ignore-fields"):
        read_questions(tmp_path / "q.parquet")
    questions, rejects = read_questions(tmp_path / "q.parquet", ignored=[field])
    assert len(questions) == 2 and rejects == []


@pytest.mark.parametrize("field", ["system_prompt", "turns", "anwser", "context", "group"])
def test_a_field_that_nothing_uses_is_refused(tmp_path: Path, field: str) -> None:
    """Catches a context, a conversation or a misspelt field that is dropped in silence."""
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "What?", "metadata": {"level": 3}, field: "x", "solution": None}))
    with pytest.raises(CordError, match=rf"line 1: its field '{field}' is used by nothing here \(used are answer, ch"):
        read_questions(file)
    file.write_text('{"question": "What?", "question": "Why?"}')
    with pytest.raises(CordError, match="the field 'question' comes twice"):
        read_questions(file)


def test_texts_that_are_not_spoken(tmp_path: Path) -> None:
    """Catches an instruction or a system prompt that is lost, read aloud, or kept although it is to be left aside."""
    rows = [
        {"id": "a", "question": "What?", "instruction": " Be brief. ", "system": "You are kind."},
        {"id": "b", "question": "What?", "instruction": "", "system": None},
        {"id": "c", "question": "What?", "system": 5},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (a, b), (reject,) = read_questions(file)
    assert (a.text, a.instruction, a.system) == ("What?", "Be brief.", "You are kind.")
    assert (b.instruction, b.system) == (None, None) and reject.reason == "its 'system' is no text but '5'"
    questions, rejects = read_questions(file, ignored=["system"])
    assert [q.system for q in questions] == [None] * 3 and questions[0].instruction == "Be brief." and not rejects


def test_saved_data_sets_are_what_their_state_names(tmp_path: Path) -> None:
    """Catches cache files of `map` that are read as more rows, rows that `select` left out, and a decoded recording."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(saved))
    data = datasets.load_from_disk(str(saved))
    data.map(lambda row: {"question": row["question"] + " Say it."})  # leaves a cache file in the directory
    assert len(list(saved.glob("*.arrow"))) == 2
    assert [q.text for q in read_questions(saved)[0]] == [row["question"] for row in ROWS]
    assert [file.name for file in question_files(saved)] == ["data-00000-of-00001.arrow"]
    data.select([2, 0]).save_to_disk(str(tmp_path / "some"))
    assert [q.answer for q in read_questions(tmp_path / "some")[0]] == ["4", "0"]
    spoken = datasets.Dataset.from_list([{"question": "What?", "sound": {"bytes": b"RIFF", "path": "a.wav"}}])
    spoken.cast_column("sound", datasets.Audio()).save_to_disk(str(tmp_path / "spoken"))
    with pytest.raises(CordError, match="spoken, row 1: its field 'sound' is a recording, which nothing uses here"):
        read_questions(tmp_path / "spoken")


def test_directories_that_are_no_split(tmp_path: Path) -> None:
    """Catches test questions that are read with the training ones, and a cache taken for a data set."""
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(CordError, match="holds several splits; give the directory of one: test, train"):
        read_questions(tmp_path / "both")
    (tmp_path / "both" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CordError, match=r"names 'data-00000-of-00001\.arrow', which is missing"):
        read_questions(tmp_path / "both" / "train")
    (tmp_path / "both" / "test" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(CordError, match="cannot be read as a saved data set"):
        read_questions(tmp_path / "both" / "test")
    (tmp_path / "both" / "test" / "state.json").write_text("{}")
    with pytest.raises(CordError, match=r"state\.json is damaged"):
        read_questions(tmp_path / "both" / "test")
    (hub := tmp_path / "hub").mkdir()
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), hub / name)
    with pytest.raises(CordError, match=r"files of several splits \(test, train\)"):
        read_questions(hub)
    (hub / "test-00000-of-00001.parquet").unlink()
    assert len(read_questions(hub)[0]) == 4
    (cache := tmp_path / "cache").mkdir()
    (cache / "cache-1.arrow").touch()
    with pytest.raises(CordError, match=r"nor a saved data set's state\.json \(found: cache-1\.arrow\)"):
        read_questions(cache)
