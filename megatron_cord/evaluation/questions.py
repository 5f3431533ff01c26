"""Questions of an evaluation: the text prompt's words, the audio prompt's recording, and the gold answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.question_files import Reject
from megatron_cord.data.samples import HEAR, READ, Sample, ViewName
from megatron_cord.data.turns import Turn
from megatron_cord.evaluation.rules.rule import Rule


@dataclass(frozen=True, eq=False)
class Question:
    """One question; it has a text, a recording, or both.

    Attributes:
        id: unique in its set.
        answer: the gold answer: for choices the letter, else a number, an expression or words; "" where a judge rates
            the response by itself.
        text: the text prompt's words; None for a question without one.
        audio: reads the recordings, each float32 [samples], mono, 16 kHz; None for a question without one.
        choices: the texts behind the letters A, B, …; "" for each whose text the set does not give apart from the
            question.
        instruction: text behind the recording, or its transcript; None where the recording is the whole question.
        group: a category or a voice, by which accuracies are shown apart; None puts it into none.
        system: the system prompt; None without one.
        turns: a conversation, as in `Sample`; `text` is then its last turn's.
        groups: further groups.
    """

    id: str
    answer: str
    text: str | None = None
    audio: Callable[[], Sequence[np.ndarray]] | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    group: str | None = None
    system: str | None = None
    turns: tuple[Turn, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def views(self) -> tuple[ViewName, ...]:
        """The views that there are prompts of."""
        return (READ,) * (self.text is not None) + (HEAR,) * (self.audio is not None)

    @property
    def asked(self) -> str:
        """What is asked as one text, for the judge and for reports."""
        return self.without_audio().asked

    def without_audio(self) -> Sample:
        """Return the sample of which prompts are made, its recordings not read."""
        return Sample(
            self.id,
            self.text or "",
            sampling_rate=SAMPLING_RATE,
            answer=self.answer,
            choices=self.choices,
            instruction=self.instruction,
            system=self.system,
            turns=self.turns,
        )

    def sample(self) -> Sample:
        """Read the recordings, if there are any, and return the sample of which prompts are made."""
        sample = self.without_audio()
        return sample if self.audio is None else sample.with_recordings(self.audio())


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """The questions of a set in its order, what of it is no usable question, and its own rule if it has one."""

    questions: Sequence[Question]
    rejects: Sequence[Reject] = ()
    rule: Rule | None = None
