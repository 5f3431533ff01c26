"""Data as it travels between rooms: a sample, and the prompts made of it, one for each view.

A view is how a model meets a sample: `HEAR` gives it the recording, `READ` the text. A `PreparedSample` is made once,
by the loader, on the ranks that generate from it and train on it; its features go with it to the microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

View = Literal["hear", "read"]
HEAR: View = "hear"  #: the recording, with an instruction if the sample has one
READ: View = "read"  #: the question as text


def _no_audio() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Sample:
    """One spoken question and its text.

    Attributes:
        id: unique within a data set; names the sample in errors and records.
        question: the text that is spoken.
        waveform: float32 [samples] in [-1, 1], mono, at ``sampling_rate`` Hz; empty where the sample was read without
            its audio.
        sampling_rate: Hz.
        answer: the gold final answer, for evaluation only; None if unknown.
        solution: a worked answer that ends in ``answer``; None if unknown.
        voice: name of the speaker; None if unknown.
        choices: the texts behind the letters A, B, … that the question offers; empty for a question that offers none.
        instruction: text beside the recording, for a recording that is a sound and not a spoken question; None for
            the recording alone.
    """

    id: str
    question: str
    waveform: np.ndarray = field(default_factory=_no_audio)
    sampling_rate: int = 16000
    answer: str | None = None
    solution: str | None = None
    voice: str | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None


def _no_token(text: str) -> str | None:
    return None


@dataclass(frozen=True)
class PromptLimits:
    """What prompts of a checkpoint can be made of; by default of anything.

    Attributes:
        shortest: samples of audio, at 16 kHz, below which a clip is too short for the encoder.
        longest: beyond which it is too long; None takes all lengths.
        control_token: returns a control token of the tokenizer that stands in a text; None for a text without one.
    """

    shortest: int = 1
    longest: int | None = None
    control_token: Callable[[str], str | None] = _no_token

    def fault(self, samples: int, question: str) -> str | None:
        """Return why no prompt can be made of a sample: of so much audio, and with this question; None if one can."""
        if samples < self.shortest:
            least = self.shortest / 16000
            return f"has {samples / 16000:.3f} s of audio, too short for the encoder, which takes {least:.3f} s or more"
        if self.longest is not None and samples > self.longest:
            return f"has {samples / 16000:.2f} s of audio, the longest allowed are {self.longest / 16000:.2f} s"
        token = self.control_token(question)
        return None if token is None else control_token_fault("question", token)


def control_token_fault(part: str, token: str) -> str:
    """Return what is wrong with a text that would end a turn or stand for audio in its prompt."""
    return f"has {token!r} in its {part}, a control token of the model; remove it from the text"


@dataclass(frozen=True, eq=False)
class AudioClip:
    """One clip as the encoder takes it.

    Attributes:
        waveform: float32 [samples], 16 kHz, for an engine with a feature extractor of its own.
        features: float32 [n_mels, frames], log-mel, padded to the encoder's window.
        num_frames: how many of the frames are audio, the rest being padding.
        num_tokens: how many audio features the adapter makes of it, which is the number of placeholders.
    """

    waveform: np.ndarray
    features: Tensor
    num_frames: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt.

    Attributes:
        sample_id: of the sample.
        token_ids: placeholders already expanded, one for each audio feature.
        clips: the audio behind the placeholders, in order; empty for a text prompt.
    """

    sample_id: str
    token_ids: tuple[int, ...]
    clips: tuple[AudioClip, ...] = field(default=())


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A sample with its prompts, and in their clips its features.

    Attributes:
        sample: the sample.
        prompts: by view; views that no use of the sample needs are left out.
    """

    sample: Sample
    prompts: Mapping[View, Prompt]
