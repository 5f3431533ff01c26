"""Greedy responses to questions' text and audio prompts, and the file that stores them.

A journal has a header line that identifies model and questions, then a line for each answered question. Scores are
computed from it afterwards, so that another rule or judge needs no new responses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Prompt, ViewName
from megatron_cord.data.turns import turns_json
from megatron_cord.errors import CordError
from megatron_cord.evaluation.questions import Question
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine
from megatron_cord.runtime.files import fingerprint


@dataclass(frozen=True)
class Answer:
    """The responses to one question.

    Attributes:
        id: the question's.
        text_response: response to the text prompt; None if the question has no text.
        audio_response: response to the audio prompt; None if the question has no recording.
        tokens: texts of the audio response's tokens.
        cut: the modalities ("text", "audio") whose response ended at the length limit.
        token_kl: divergence from the teacher at each token of the audio response, nats (None: not finite); None if not
            measured.
        reject: why no prompt could be built; None for an answered question.
    """

    id: str
    text_response: str | None = None
    audio_response: str | None = None
    tokens: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    token_kl: tuple[float | None, ...] | None = None
    reject: str | None = None


@dataclass(frozen=True, eq=False)
class PreparedQuestion:
    """A question with its prompts by view; `reject`: why there are none."""

    question: Question
    prompts: Mapping[ViewName, Prompt]
    reject: str | None = None


@dataclass(frozen=True, eq=False)
class AudioResponse:
    """A response to the audio prompt, and the text prompt on which a teacher scores it."""

    audio_prompt: Prompt
    text_prompt: Prompt
    rollout: Rollout


@dataclass(frozen=True)
class Measured:
    """Divergences of responses, as in `Answer.token_kl`, and scalar metrics by name."""

    token_kl: Sequence[Sequence[float | None] | None] = ()
    metrics: dict[str, float] = field(default_factory=dict)


#: Measures the divergence at each token of responses. Collective.
Measure = Callable[[Sequence[AudioResponse]], Measured]


def prepare(question: Question, prompts: PromptBuilder) -> PreparedQuestion:
    """Build the prompts of a question."""
    try:
        (prepared,) = prompts.prepare([question.sample()], question.views)
    except CordError as error:
        return PreparedQuestion(question, {}, reject=str(error))
    return PreparedQuestion(question, prepared.prompts)


def generate_answers(
    prepared: Sequence[PreparedQuestion],
    engine: RolloutEngine,
    prompts: PromptBuilder,
    max_new_tokens: int,
    measure: Measure | None = None,
    measured: int = 0,
) -> tuple[list[Answer], dict[str, float]]:
    """Generate greedy responses to all prompts in one call of the engine. Collective.

    Args:
        prepared: the questions.
        engine: generates the responses.
        prompts: decodes token ids.
        max_new_tokens: the length limit of responses.
        measure: applied to the first `measured` audio responses whose question has a text prompt, too.
        measured: their number.

    Returns:
        one answer for each question, in the same order, and the measured scalars.
    """
    asked = [(view, p.question.id, p.prompts[view]) for view in (READ, HEAR) for p in prepared if view in p.prompts]
    rollouts = engine.generate([GenerationRequest(p, 0.0, max_new_tokens) for *_, p in asked]) if asked else []
    made = {(view, name): rollout for (view, name, _), rollout in zip(asked, rollouts, strict=True)}
    responses = {
        p.question.id: AudioResponse(p.prompts[HEAR], p.prompts[READ], made[HEAR, p.question.id])
        for p in prepared
        if {HEAR, READ} <= p.prompts.keys()
    }
    chosen = list(responses)[:measured]
    found = Measured() if measure is None else measure([responses[name] for name in chosen])
    token_kl = dict(zip(chosen, found.token_kl, strict=False))
    answers = []
    for p in prepared:
        name = p.question.id
        text, audio = made.get((READ, name)), made.get((HEAR, name))
        divergence = token_kl.get(name)
        answers.append(
            Answer(
                id=name,
                text_response=None if text is None else text.text,
                audio_response=None if audio is None else audio.text,
                tokens=() if audio is None else tuple(prompts.token_strings(audio.token_ids)),
                cut=tuple(kind for kind, r in (("text", text), ("audio", audio)) if r and r.finish_reason == "length"),
                token_kl=None if divergence is None else tuple(divergence),
                reject=p.reject,
            )
        )
    return answers, found.metrics


class Journal:
    """The file of the answers to one question set.

    Args:
        path: the file; it may have part of the answers already.
        model: identifies the weights, and the precision if it is known; None accepts the answers of any model, for
            comparisons.
        questions: the set's.
        max_new_tokens: the length limit of answers.
    """

    def __init__(self, path: Path, model: str | None, questions: Sequence[Question], max_new_tokens: int) -> None:
        self.path = path
        parts = [json.dumps(_identity(question)) for question in questions]
        self._header = {"model": model, "questions": fingerprint(parts), "max_new_tokens": max_new_tokens}

    def read(self) -> dict[str, Answer]:
        """Read the answers by question, and remove a torn last line.

        Raises:
            CordError: the file is damaged, or another model, set or length limit gave its answers.
        """
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            self.path.unlink()
            return {}
        header, *lines = whole.decode("utf-8", errors="replace").rstrip("\n").split("\n")
        try:
            begun = json.loads(header)
            changed = sorted(name for name, value in self._header.items() if value is not None and begun[name] != value)
            answers = [_from_json(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise CordError(
                f"{self.path} is damaged ({error}); delete it, and its questions are answered again"
            ) from None
        if changed:
            raise CordError(
                f"{self.path} holds answers for other {' and '.join(changed)}; delete it, or choose another output_dir"
            )
        return {answer.id: answer for answer in answers}

    def append(self, answers: Sequence[Answer]) -> None:
        """Append answers, and sync the file to the disk.

        Raises:
            CordError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header = [] if self.path.exists() else [self._header]
            with self.path.open("ab") as file:
                for line in header + [asdict(answer) for answer in answers]:
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CordError(
                f"{self.path}: cannot be written ({error.strerror}); free space and start again; earlier answers stay"
            ) from None


def _identity(question: Question) -> list[Any]:
    """Return the fields that identify a question; of a recording only whether there is one."""
    q = question
    chat = [q.system, turns_json(q.turns)] if q.system is not None or q.turns else []
    return [q.id, q.answer, q.text, q.audio is not None, q.choices, q.instruction, *chat]


def answer_of(row: Mapping[str, Any]) -> Answer:
    """Return the answer behind a row of a set's result, which has more fields."""
    return _from_json({each.name: row.get(each.name) for each in fields(Answer)})


def _from_json(plain: dict[str, Any]) -> Answer:
    kl = plain["token_kl"]
    tuples = {"tokens": tuple(plain["tokens"]), "cut": tuple(plain["cut"])}
    return Answer(**plain | tuples | {"token_kl": None if kl is None else tuple(kl)})
