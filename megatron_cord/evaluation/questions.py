"""Questions of an evaluation: the text prompt's words, the audio prompt's recording, and the gold answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.question_files import Reject
from megatron_cord.data.samples import Sample


@dataclass(frozen=True, eq=False)
class Question:
    """One question; it has a text, a recording, or both.

    Attributes:
        id: unique in its set.
        answer: the gold answer: for choices the letter, else a number, an expression or words.
        text: the text prompt's words; None for a question without one.
        audio: reads the recording, float32 [samples], mono, 16 kHz; None for a question without one.
        choices: the texts behind the letters A, B, …; "" for each whose text the set does not give apart from the
            question.
        instruction: text beside the recording in the audio prompt; None where the recording is the whole question.
        group: a category or a voice, by which accuracies are shown apart; None puts it into none.
    """

    id: str
    answer: str
    text: str | None = None
    audio: Callable[[], np.ndarray] | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    group: str | None = None

    def sample(self) -> Sample:
        """Read the recording, if there is one, and return the sample of which prompts are made."""
        return Sample(
            self.id,
            self.text or "",
            np.zeros(0, np.float32) if self.audio is None else self.audio(),
            SAMPLING_RATE,
            self.answer,
            choices=self.choices,
            instruction=self.instruction,
        )


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """The questions of a set in its order, and what of it is no usable question."""

    questions: Sequence[Question]
    rejects: Sequence[Reject] = ()
