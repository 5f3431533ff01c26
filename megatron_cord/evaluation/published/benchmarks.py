"""GSM8K, MMAU, Big Bench Audio, MMSU and MMAR."""

from __future__ import annotations

from megatron_cord.data.choices import Choices, lettered, read_choices
from megatron_cord.data.fields import listed
from megatron_cord.evaluation.published.rows import Fields, Published, Row, UnusableError, text_of
from megatron_cord.evaluation.rules.choices import MMARChoices, MMSUChoices

_BIG_BENCH_CHOICES = {"formal_fallacies": ("valid", "invalid"), "navigate": ("Yes", "No"), "web_of_lies": ("Yes", "No")}
# The rules of MMSU and MMAR read answers in one form each, so the questions ask for it.
_BY_LETTER = "Reply with the letter of the right choice and nothing else."
_BY_TEXT = "Reply with the text of the right choice and nothing else."


def _gsm8k(row: Row) -> Fields:
    answer = row.get("answer")
    if isinstance(answer, str) and "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip().replace(",", "")
    return Fields(row.get("question"), row.get("audio", row.get("question_audio")), answer)


def _mmau(row: Row) -> Fields:
    question, choices = row.get("question"), row.get("choices")
    if not isinstance(question, str) or choices is None:
        raise UnusableError(f"it has no 'question' with 'choices' (its fields: {listed(row)})")
    offered = read_choices(choices)
    instruction = f"{question.strip()} {lettered(offered.texts)}"
    return Fields(None, row.get("audio_id", row.get("audio")), row.get("answer"), offered, instruction, row.get("task"))


def _big_bench_audio(row: Row) -> Fields:
    category = row.get("category")
    offered = _BIG_BENCH_CHOICES.get(str(category))
    return Fields(
        text=row.get("transcript"),
        audio=row.get("audio", row.get("file_name")),
        answer=row.get("official_answer"),
        choices=None if offered is None else Choices(offered),
        group=category,
    )


def _mmsu(row: Row) -> Fields:
    question = text_of(row, "question").strip()
    given = [row.get(f"choice_{letter}") for letter in "abcd"]
    offered = read_choices([choice for choice in given if choice not in (None, "")])
    parts = [str(row[name]) for name in ("category", "sub-category", "sub-sub-category") if row.get(name)]
    groups = [" / ".join(parts[:depth]) for depth in range(2, len(parts) + 1)]
    if row.get("task_name"):
        groups.append(f"task: {row['task_name']}")
    return Fields(
        None,
        row.get("audio", row.get("audio_path")),
        row.get("answer_gt"),
        offered,
        f"{question} {lettered(offered.texts)} {_BY_LETTER}",
        parts[0] if parts else None,
        groups=tuple(groups),
    )


def _mmar(row: Row) -> Fields:
    question = text_of(row, "question").strip()
    if not isinstance(row.get("choices"), (list, tuple)):
        raise UnusableError(f"it has no list of 'choices' (its fields: {listed(row)})")
    offered = read_choices([choice for choice in row["choices"] if choice != ""])  # four published rows have empty ones
    groups = [f"{name}: {row[name]}" for name in ("category", "sub-category") if row.get(name)]
    return Fields(
        None,
        row.get("audio", row.get("audio_path")),
        row.get("answer"),
        offered,
        f"{question} {lettered(offered.texts)} {_BY_TEXT}",
        row.get("modality"),
        groups=tuple(groups),
    )


BENCHMARKS = {
    "gsm8k": Published(_gsm8k, ("question", "audio", "question_audio", "answer")),
    "mmau": Published(_mmau, ("question", "audio_id", "audio", "choices", "answer", "task")),
    "big_bench_audio": Published(_big_bench_audio, ("transcript", "audio", "file_name", "official_answer", "category")),
    "mmsu": Published(_mmsu, ("question", "audio", "audio_path", "answer_gt"), MMSUChoices()),
    "mmar": Published(_mmar, ("question", "audio", "audio_path", "choices", "answer"), MMARChoices()),
}
