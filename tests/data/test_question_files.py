"""Files of written questions: broken rows are named, and all formats give the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cord.data.question_files import read_questions
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
    ]
    file.write_bytes(b"\n".join(rows))
    questions, rejects = read_questions(file)
    assert [(q.id, q.text, q.answer) for q in questions] == [
        ("line-1", "Which is a metal? A. iron. B. wood.", "B"),
        ("a", "What?", "4"),
    ]
    reasons = {r.id: r.reason for r in rejects}
    assert (
        "none of its choices" in reasons["line-2"] and "UTF-8" in reasons["line 3"] and "not JSON" in reasons["line 4"]
    )
    assert "no JSON object" in reasons["line 5"] and "its fields: text" in reasons["line-6"] and "twice" in reasons["a"]
    assert "other characters" in reasons["line 9"] and "'answer'" in reasons["b"]
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
