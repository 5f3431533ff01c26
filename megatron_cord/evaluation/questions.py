"""One question of an evaluation: what is read, what is heard, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.samples import Sample
from megatron_cord.data.wav import SAMPLING_RATE


@dataclass(frozen=True, eq=False)
class Question:
    """One question; it has a text, a recording, or both.

    Attributes:
        id: unique in its set.
        answer: the gold answer: for choices the letter, else a number, an expression or words.
        text: what is read; None for a question that is only heard.
        audio: reads the recording, float32 [samples], mono, 16 kHz; None for a question that is only read.
        choices: the texts behind the letters A, B, …; "" for each whose text the set does not give apart from the question.
        instruction: what is read beside the recording; None where the recording asks by itself.
        group: a category or a voice, by which accuracies are shown apart; None puts it into none.
    """

    id: str
    answer: str
    text: str | None = None
    audio: Callable[[], np.ndarray] | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    group: str | None = None

    def written(self) -> Sample:
        """For the text prompt."""
        return Sample(self.id, self.text or "", np.zeros(0, np.float32), answer=self.answer, choices=self.choices)

    def spoken(self) -> Sample:
        """For the audio prompt; reads the recording."""
        assert self.audio is not None
        return Sample(
            self.id,
            self.text or "",
            self.audio(),
            SAMPLING_RATE,
            self.answer,
            choices=self.choices,
            instruction=self.instruction,
        )
