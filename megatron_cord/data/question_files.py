"""Written questions from JSONL, Parquet or a saved Hugging Face dataset.

A row is {"question": …, "answer": …, "solution": …, "choices": …, "id": …}; `choices` tells how choices may be written.
"instruction" and "system" are texts of the prompt that are not spoken.

Only "question" is needed. A field that nothing uses ends the work, a recording above all: its words would be spoken
anew by another voice. A row that cannot be used is a reject with its place and reason, not the end of the work;
the caller bounds how many there may be. Choices are read out after the question, lettered, so that reading and
hearing ask for the same.

What it simplifies: the whole file is held in memory (80,000 questions are some 40 MB).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_cord.data.choices import ChoicesError, lettered, read_choices
from megatron_cord.data.fields import find_unused, listed, read_row
from megatron_cord.data.saved_datasets import is_saved_dataset, saved_files, saved_rows
from megatron_cord.errors import CordError

_PROMPT_FIELDS = ("instruction", "system")
_OTHER_FIELDS = ("id", "solution", "choices", *_PROMPT_FIELDS)
_ID = re.compile(r"[A-Za-z0-9_+-]{1,120}")
_BATCH = 100  # rows of Parquet that are in memory together; they may hold recordings
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as the hub names the parts of a split


@dataclass(frozen=True)
class WrittenQuestion:
    """One usable row.

    Attributes:
        id: unique in its file; the row's number where the file gives none.
        text: what is asked, choices included.
        answer: the gold answer; for choices its letter. None if unknown.
        solution: a worked answer; None if there is none.
        choices: the texts behind the letters; empty where there is no choice.
        instruction: text beside the spoken question; None without one.
        system: the system prompt; None without one.
    """

    id: str
    text: str
    answer: str | None = None
    solution: str | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Reject:
    """What was left out.

    Attributes:
        id: of the question, or the row's place ("line 12").
        reason: why.
    """

    id: str
    reason: str


def read_questions(
    path: str | Path, *, question: str = "question", answer: str = "answer", ignored: Collection[str] = ()
) -> tuple[list[WrittenQuestion], list[Reject]]:
    """All questions of a file, in its order, and what is wrong with the others.

    Args:
        path: a .jsonl or .parquet file, a directory of .parquet files, or one that `datasets.save_to_disk` wrote.
        question: the field that asks.
        answer: the field that answers.
        ignored: fields that may be left aside.

    Raises:
        CordError: the file is missing, of another kind or damaged as a whole, a row has a field that nothing uses, or
            no row of it is usable.
    """
    path = Path(path)
    used = (question, answer, *_OTHER_FIELDS)
    questions: list[WrittenQuestion] = []
    rejects: list[Reject] = []
    seen: set[str] = set()
    for place, row in read_rows(path):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        result = _question(place, {name: row[name] for name in row if name not in ignored}, question, answer)
        if isinstance(result, WrittenQuestion) and result.id in seen:
            result = Reject(result.id, "its id comes twice")
        if isinstance(result, Reject):
            rejects.append(result)
            continue
        if (unused := find_unused(row, used, ignored=ignored, how="--ignore-fields")) is not None:
            raise CordError(f"{path}, {place}: {unused}")
        seen.add(result.id)
        questions.append(result)
    if not questions:
        first = f"; {rejects[0].id}: {rejects[0].reason}" if rejects else ": it is empty"
        raise CordError(
            f"{path} has no usable question{first}; write one JSON object a line, with a field {question!r}"
        )
    return questions, rejects


def _question(place: str, row: dict[str, Any], question: str, answer: str) -> WrittenQuestion | Reject:
    name = row.get("id")
    name = place.replace(" ", "-") if name is None else str(name)
    if not _ID.fullmatch(name):
        return Reject(
            place, f"its id {name[:40]!r} has other characters than letters, digits, '_', '+' and '-', or too many"
        )
    text = row.get(question)
    if not isinstance(text, str) or not text.strip():
        return Reject(name, f"it has no text in {question!r} (its fields: {listed(row)})")
    gold, solution = row.get(answer), row.get("solution")
    if not isinstance(solution, (str, type(None))):
        return Reject(name, f"its 'solution' is no text but {str(solution)[:40]!r}")
    prompt: dict[str, str | None] = {}
    for part in _PROMPT_FIELDS:
        given = row.get(part)
        if not isinstance(given, (str, type(None))):
            return Reject(name, f"its {part!r} is no text but {str(given)[:40]!r}")
        prompt[part] = (given or "").strip() or None
    text = text.strip()
    choices: tuple[str, ...] = ()
    if row.get("choices") is not None:
        try:
            read = read_choices(row["choices"])
            gold, choices = None if gold is None else read.letter_of(gold), read.texts
        except ChoicesError as error:
            return Reject(name, str(error))
        text = f"{text} {lettered(choices)}"
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        gold = str(gold)
    if not isinstance(gold, (str, type(None))):
        return Reject(name, f"its {answer!r} is no text but {str(gold)[:40]!r}")
    return WrittenQuestion(name, text, gold, solution, choices, **prompt)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """Every row of a file with its place ("line 12", "row 3"), or why it is none.

    Raises:
        CordError: the file is missing, of another kind, or damaged as a whole.
    """
    if not path.exists():
        raise CordError(f"{path}: no such file; give questions as .jsonl or .parquet")
    if path.is_dir() and is_saved_dataset(path):
        for number, saved in enumerate(saved_rows(path), 1):
            yield f"row {number}", saved
        return
    if path.suffix == ".json" and path.is_file() and _holds_array(path):
        yield from _json_array(path)
    elif path.suffix in {".jsonl", ".json"} and path.is_file():
        yield from _json_lines(path)
    elif path.suffix == ".parquet" or path.is_dir():
        yield from _table_rows(path)
    else:
        raise CordError(
            f"{path}: unknown kind of file; give .jsonl, .parquet, a directory of .parquet files, or a saved data set"
        )


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                row = read_row(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield place, Reject(place, f"it is not UTF-8 (byte {error.start})")
                continue
            except (ValueError, RecursionError) as error:
                yield place, Reject(place, f"it is not JSON ({str(error)[:80]})")
                continue
            yield place, row if isinstance(row, dict) else Reject(place, "it is no JSON object")


def _json_array(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    try:
        rows = read_row(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CordError(f"{path} is not JSON in UTF-8 ({str(error)[:120]}); write it again") from None
    for number, row in enumerate(rows, 1):
        place = f"row {number}"
        yield place, row if isinstance(row, dict) else Reject(place, "it is no JSON object")


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    number = 0
    for file in question_files(path):
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=_BATCH):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise CordError(f"{file} cannot be read ({str(error).splitlines()[0][:120]}); write it again") from error


def count_rows(path: Path) -> int | None:
    """Return how many rows `read_rows` yields, blank lines included; None where only reading them tells."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for _ in file)
    if path.suffix == ".parquet" or (path.is_dir() and not is_saved_dataset(path)):
        return sum(int(pyarrow.parquet.read_metadata(file).num_rows) for file in question_files(path))
    return None


def question_files(path: Path) -> list[Path]:
    """Return the files that `read_rows` reads, in their order.

    Raises:
        CordError: a directory without any, or with files of several splits.
    """
    if path.is_file():
        return [path]
    if is_saved_dataset(path):
        return saved_files(path)
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        names = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise CordError(
            f"{path} holds neither .parquet files nor a saved data set's state.json (found: {names}); give the "
            "directory of one split"
        )
    splits = {match[1] for file in files if (match := _PART.fullmatch(file.name))}
    if len(splits) > 1:
        raise CordError(f"{path} holds files of several splits ({', '.join(sorted(splits))}); give one in a directory")
    return files


def _holds_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
