"""What the other rooms exchange about data: a spoken question, and the prompts made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One spoken question and its text.

    Attributes:
        id: unique within a data set; names the sample in errors and records.
        question: what the teacher reads and the speaker says.
        waveform: float32 [samples] in [-1, 1], mono, at ``sampling_rate`` Hz.
        sampling_rate: Hz.
        answer: the gold final answer, for evaluation only; None if unknown.
        solution: a worked answer that ends in ``answer``; None if unknown.
        voice: who speaks; None if unknown.
        choices: the texts behind the letters A, B, … that the question offers; empty for a question that offers none.
        instruction: what is read beside the recording, where that is no spoken question but a sound to be asked about; None hears alone.
    """

    id: str
    question: str
    waveform: np.ndarray
    sampling_rate: int = 16000
    answer: str | None = None
    solution: str | None = None
    voice: str | None = None
    choices: tuple[str, ...] = ()
    instruction: str | None = None


@dataclass(frozen=True, eq=False)
class AudioClip:
    """One clip as the encoder takes it.

    Attributes:
        waveform: float32 [samples], 16 kHz (an engine with a feature extractor of its own takes this).
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
        sample_id: the sample that it asks.
        token_ids: placeholders already expanded, one for each audio feature.
        clips: the audio behind the placeholders, in order; empty for a text prompt.
    """

    sample_id: str
    token_ids: tuple[int, ...]
    clips: tuple[AudioClip, ...] = field(default=())
