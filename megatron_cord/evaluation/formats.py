"""Question sets as published, and a plain form, read as `Question`s.

| format | a row has |
|---|---|
| shards | what shards have; the recording is the spoken question |
| plain | answer, question or audio or both, or turns; also choices, instruction, system, group, id |
| voicebench | prompt, reference (a letter), audio: OpenBookQA and MMSU of VoiceBench by the rules of this project |
| voicebench/… | prompt, audio, and what `published.voicebench` reads: its subsets, each by its own rule |
| mmsu, mmar | as published: sounds with a question in text beside them, by their own rules |
| gsm8k | question, answer (a solution that ends in "#### 72", or the number), audio |
| mmau | audio_id, question, choices, answer (one choice's text), task: a sound with a question in text beside it |
| big_bench_audio | file_name or audio, official_answer, category, transcript |

Rows come from .jsonl, .json, .parquet, a data set that `datasets` saved, or one on the hub (hf://OWNER/NAME). What a
published set has beside these fields is of no use here; a field of the plain form that nothing uses is refused, as is
one that would change what a published set asks, such as a system prompt. `turns` are those of
`megatron_cord.data.turns`. A recording is a path (from the file's folder, or from `audio_root`), or bytes in the row as
Parquet files of spoken sets have them; it is read when its prompt is made. What it simplifies: the rows, bytes
included, are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.data.choices import ChoicesError, lettered, read_choices
from megatron_cord.data.fields import find_unused, listed
from megatron_cord.data.hub_rows import PREFIX, hub_rows
from megatron_cord.data.question_files import Reject, read_rows
from megatron_cord.data.samples import PromptDefaults
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.turns import TextPart, Turn, TurnsError, read_turns, written
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import SetConfig
from megatron_cord.evaluation.published.benchmarks import BENCHMARKS
from megatron_cord.evaluation.published.rows import Fields, Published, UnusableError
from megatron_cord.evaluation.published.voicebench import VOICEBENCH
from megatron_cord.evaluation.questions import Question, QuestionSet

#: What changes a question wherever it stands.
_ASKING = (
    "question", "prompt", "instruction", "instructions", "system", "system_prompt", "messages", "conversations",
    "turns", "context", "passage", "choices", "options", "image",
)  # fmt: skip


def load_set(config: SetConfig) -> QuestionSet:
    """Read the questions of a set.

    Raises:
        CordError: no such file, one damaged as a whole, or none of its rows is a question.
    """
    if config.format == "shards":
        return shard_questions(ShardDataset(config.path, defaults=config.defaults), config.samples)
    return _checked(_from_rows(config), f"{config.path}, read as format {config.format},")


def judged_sets(sets: Mapping[str, SetConfig]) -> dict[str, SetConfig]:
    """Return those of the sets whose rule needs a judge."""
    rules = {name: _FORMATS[given.format].rule for name, given in sets.items() if given.format in _FORMATS}
    return {name: sets[name] for name, rule in rules.items() if rule is not None and rule.judged}


def shard_questions(shards: ShardDataset, count: int) -> QuestionSet:
    """Return the first samples of spoken shards as questions; their recordings are read when they are needed.

    Args:
        shards: with gold answers.
        count: how many samples; 0 takes all.

    Raises:
        CordError: no sample has a gold answer.
    """
    questions, rejects = [], []
    for index in range(min(count or len(shards), len(shards))):
        sample = shards.without_audio(index)
        if sample.answer is None:
            rejects.append(Reject(sample.id, "it has no answer"))
            continue
        questions.append(
            Question(
                id=sample.id,
                answer=sample.answer,
                text=sample.question,
                audio=partial(_recordings, shards, index),
                choices=sample.choices,
                instruction=sample.instruction,
                group=sample.voice,
                system=sample.system,
                turns=sample.turns,
            )
        )
    return _checked(QuestionSet(questions, rejects), "the set of shards")


def _recordings(shards: ShardDataset, index: int) -> Sequence[np.ndarray]:
    return shards[index].recordings


def _checked(found: QuestionSet, what: str) -> QuestionSet:
    if not found.questions:
        first = f"; the first row, {found.rejects[0].id}: {found.rejects[0].reason}" if found.rejects else ""
        raise CordError(f"{what} has no usable question{first}")
    return found


def _rows(config: SetConfig) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """Yield the rows of a set with their places."""
    if not config.path.startswith(PREFIX):
        yield from read_rows(Path(config.path))
        return
    for number, row in enumerate(hub_rows(config.path, config.subset, config.split), 1):
        yield f"row {number}", row


def _from_rows(config: SetConfig) -> QuestionSet:
    path = Path(config.path)
    root = Path(config.audio_root) if config.audio_root else (path if path.is_dir() else path.parent)
    questions: list[Question] = []
    rejects: list[Reject] = []
    seen: set[str] = set()
    published = _FORMATS[config.format]
    for place, row in _rows(config):
        if config.samples and len(questions) == config.samples:
            break
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        given = row.get("id")
        name = place.replace(" ", "-") if given is None else str(given)[:120]
        if name in seen and config.format == "voicebench/bbh":  # where an id may be no more than the task's name
            name = f"{name[:100]}-{place.replace(' ', '-')}"
        try:
            if name in seen:
                raise UnusableError("its id comes twice")
            fields = published.adapter(row)
            questions.append(_question(name, fields, root, listed(row), config.defaults))
            _refuse_unused(row, published.used, config, f"{config.path}, {place}")
            seen.add(name)
        except (UnusableError, ChoicesError, TurnsError) as error:
            rejects.append(Reject(name, str(error)))
    return QuestionSet(questions, rejects, published.rule)


def _refuse_unused(row: dict[str, Any], used: tuple[str, ...], config: SetConfig, where: str) -> None:
    """Refuse the whole set: such a field is in all rows, or a mistake."""
    counts = row if config.format == "plain" else {name: row[name] for name in _ASKING if name in row}
    how = "evaluation.sets.….ignore"
    if (unused := find_unused(counts, ("id", *used), ignored=config.ignore, how=how)) is not None:
        raise CordError(f"{where}: {unused}")


def _question(name: str, fields: Fields, root: Path, found: str, defaults: PromptDefaults) -> Question:
    named = (("question", fields.text), ("instruction", fields.instruction), ("system", fields.system))
    for what, value in named:
        if not isinstance(value, (str, type(None))):
            raise UnusableError(f"its {what} is no text")
    if fields.answered and (fields.answer is None or fields.answer == ""):
        raise UnusableError(f"it has no answer (its fields: {found})")
    if isinstance(fields.answer, bool) or not isinstance(fields.answer, (str, int, float)):
        raise UnusableError("its answer is no text")
    answer = str(fields.answer).strip() if fields.choices is None else fields.choices.letter_of(fields.answer)
    text = fields.text.strip() if fields.text and fields.text.strip() else None
    references = fields.recordings or (() if fields.audio is None else (fields.audio,))
    audio = _together([_recording(reference, root, name) for reference in references]) if references else None
    if text is None and audio is None:
        raise UnusableError(f"it has neither text nor recording (its fields: {found})")
    system, instruction = (text if text and text.strip() else None for text in (fields.system, fields.instruction))
    if instruction is None and not fields.turns:
        instruction = defaults.instruction
    return Question(
        name,
        answer,
        text,
        audio,
        fields.choices.texts if fields.choices else (),
        instruction,
        None if fields.group is None else str(fields.group),
        defaults.system if system is None else system,
        fields.turns,
        fields.groups,
    )


def _together(reads: Sequence[Callable[[], np.ndarray]]) -> Callable[[], Sequence[np.ndarray]]:
    return lambda: [read() for read in reads]


def _recording(value: Any, root: Path, name: str) -> Callable[[], np.ndarray]:
    """Return a function that reads a recording from a path, or from a row's {"bytes": …, "path": …}."""
    content, path = None, value
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    if content is not None:
        if not isinstance(content, bytes):
            raise UnusableError("its recording is no bytes")
        return lambda: decode_audio(content, f"recording of {name}")
    if not isinstance(path, str) or not path or "\0" in path:
        raise UnusableError("its recording is neither a path nor bytes")
    file = root / path

    def read() -> np.ndarray:
        try:
            return decode_audio(file.read_bytes(), str(file))
        except OSError as error:
            raise CordError(
                f"{file}: cannot be read ({error.strerror}); is evaluation.sets.….audio_root right?"
            ) from None

    return read


def _plain(row: dict[str, Any]) -> Fields:
    text, instruction, system = row.get("question"), row.get("instruction"), row.get("system")
    choices = None if row.get("choices") is None else read_choices(row["choices"])
    if row.get("turns") is not None:
        if both := [name for name in ("question", "audio", "instruction") if row.get(name) is not None]:
            raise UnusableError(f"it has turns and {both[0]}; write all texts and recordings into the turns")
        references: list[Any] = []
        turns = read_turns(row["turns"], partial(_numbered, references))
        if choices:
            offered = TextPart(f"\n{lettered(choices.texts)}")
            turns = (*turns[:-1], Turn("user", (*turns[-1].parts, offered)))
        asked = written(turns[-1].parts)
        return Fields(asked, None, row.get("answer"), choices, None, row.get("group"), system, turns, tuple(references))
    if isinstance(text, str) and choices and instruction is None:
        text = f"{text.strip()} {lettered(choices.texts)}"
    elif isinstance(instruction, str) and choices:
        instruction = f"{instruction.strip()} {lettered(choices.texts)}"
    return Fields(text, row.get("audio"), row.get("answer"), choices, instruction, row.get("group"), system)


def _numbered(references: list[Any], reference: Any) -> int:
    """Return the number of a recording among those that came before; a path that comes again is the same recording."""
    if not isinstance(reference, str) or reference not in references:
        references.append(reference)
        return len(references) - 1
    return references.index(reference)


_FORMATS: dict[str, Published] = {
    "plain": Published(_plain, ("question", "audio", "answer", "choices", "instruction", "group", "system", "turns")),
    **VOICEBENCH,
    **BENCHMARKS,
}
