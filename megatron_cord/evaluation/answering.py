"""Asks an engine the questions of a set, reading and hearing, and keeps every answer as soon as it is there.

`{set}.jsonl` holds one line a question that was answered, after a first line that says of which model and which questions. A killed evaluation goes
on behind the last whole line; scores are made of the answers afterwards, so a better rule or another judge asks no engine again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.evaluation.questions import Question
from megatron_cord.rollout.types import GenerationRequest, RolloutEngine


@dataclass(frozen=True)
class Answered:
    """What came of one question.

    Attributes:
        id: of the question.
        text_response, audio_response: what the model said to what it read and heard; None where the question is not asked so.
        tokens: the audio response, token by token.
        cut: which of the responses ended at the length limit.
        reject: why it could not be asked; None if it was.
    """

    id: str
    text_response: str | None = None
    audio_response: str | None = None
    tokens: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    reject: str | None = None


class Answers:
    """The answers to one set, in a file.

    Args:
        path: of the file; it may be half made.
        model: stands for the weights that answer.
        questions: of the set.
        max_new_tokens: answers are cut there.
        any_model: take the answers of whatever model the file holds, to compare with.
        reads: whether to look at the file; a rank that does not write is told what is done.

    Raises:
        CordError: the file holds answers of another model, to other questions, or cut elsewhere.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        questions: Sequence[Question],
        max_new_tokens: int,
        *,
        any_model: bool = False,
        reads: bool = True,
    ) -> None:
        self._any_model = any_model
        self.path, self.questions, self.max_new_tokens = path, questions, max_new_tokens
        self._header = {"model": model, "questions": _fingerprint(questions), "max_new_tokens": max_new_tokens}
        self.done: dict[str, Answered] = {}
        if reads and path.is_file():
            self._read()

    @property
    def missing(self) -> list[Question]:
        """Questions without an answer, in the set's order."""
        return [question for question in self.questions if question.id not in self.done]

    def assume(self, ids: Sequence[str]) -> None:
        """Takes these questions for answered, on a rank that did not read the answers."""
        self.done = {name: Answered(name) for name in ids} | self.done

    def take(self, answers: Sequence[Answered], *, writes: bool) -> None:
        """Keeps answers; on the one rank that writes also in the file, before it returns."""
        self.done |= {answer.id: answer for answer in answers}
        if not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begins = not self.path.exists()
        try:
            with self.path.open("ab") as file:
                for line in [self._header] * begins + [asdict(answer) for answer in answers]:
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CordError(
                f"{self.path}: cannot be written ({error.strerror}); make room, and call again: answers are kept"
            ) from None

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:  # the line at which it was killed
                file.truncate(len(whole))
        if not whole:
            self.path.unlink()
            return
        header, *lines = whole.decode("utf-8", errors="replace").rstrip("\n").split("\n")
        try:
            begun = json.loads(header)
            changed = sorted(
                name
                for name in self._header
                if begun[name] != self._header[name] and not (name == "model" and self._any_model)
            )
            answers = [json.loads(line) for line in lines]
            self.done = {
                a["id"]: Answered(**a | {"tokens": tuple(a["tokens"]), "cut": tuple(a["cut"])}) for a in answers
            }
        except (ValueError, KeyError, TypeError) as error:
            raise CordError(f"{self.path} is damaged ({error}); delete it, and its questions are asked again") from None
        if changed:
            raise CordError(
                f"{self.path} holds answers for other {' and '.join(changed)}; delete it, or choose another output_dir"
            )


def answer_set(
    answers: Answers,
    prompts: PromptBuilder,
    engine: RolloutEngine,
    *,
    chunk: int,
    writes: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Asks what is missing, greedily. All ranks call it alike; the engine's calls are collective.

    Args:
        answers: of the set; filled.
        prompts: builds both prompts.
        engine: generates.
        chunk: questions between two writings.
        writes: whether this rank writes the file.
        progress: called with the number of questions done since the last call.
    """
    missing = answers.missing
    progress(len(answers.questions) - len(missing))
    for start in range(0, len(missing), chunk):
        made = list(_ask(missing[start : start + chunk], answers.max_new_tokens, prompts, engine))
        answers.take(made, writes=writes)
        progress(len(made))


def _ask(
    questions: Sequence[Question], max_new_tokens: int, prompts: PromptBuilder, engine: RolloutEngine
) -> Iterator[Answered]:
    requests: list[GenerationRequest] = []
    rejects: dict[str, str] = {}
    for question in questions:
        try:
            built = []
            if question.text is not None:
                built.append(prompts.text_prompt(question.written()))
            if question.audio is not None:
                built.append(prompts.audio_prompt(question.spoken()))
        except CordError as error:
            rejects[question.id] = str(error)
        else:
            requests += [GenerationRequest(prompt, 0.0, max_new_tokens) for prompt in built]
    rollouts = iter(engine.generate(requests) if requests else [])
    for question in questions:
        if question.id in rejects:
            yield Answered(question.id, reject=rejects[question.id])
            continue
        said: dict[str, Any] = {}
        cut = []
        for way, asked in (("text", question.text), ("audio", question.audio)):
            if asked is not None:
                rollout = next(rollouts)
                said[f"{way}_response"] = rollout.text
                cut += [way] * (rollout.finish_reason == "length")
                if way == "audio":
                    said["tokens"] = tuple(prompts.token_strings(rollout.token_ids))
        yield Answered(question.id, cut=tuple(cut), **said)


def _fingerprint(questions: Sequence[Question]) -> str:
    """16 hexadecimal digits for what is asked; recordings count by whether there is one."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([q.id, q.answer, q.text, q.audio is not None, q.choices, q.instruction]).encode())
    return digest.hexdigest()[:16]
