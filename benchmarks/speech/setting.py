"""The task of both sides of `benchmarks.speech.step`: spoken questions of random words, of a real set's lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.smollm2 import words
from megatron_cord.data.samples import Sample


@dataclass(frozen=True)
class SpeechSetting:
    """One run: steps of CORD's weighted reverse KL on the adapter, encoder and language model frozen."""

    dtype: str = "bfloat16"
    prompts: int = 16  #: a step, one response each
    shortest: int = 7  #: words of a question
    longest: int = 14
    seconds_per_word: float = 0.2  #: of its recording
    system_words: int = 6
    new_tokens: int = 12
    top_k: int = 4  #: of CORD's token weights
    skipped_steps: int = 1  #: at the beginning, not timed
    steps: int = 3
    learning_rate: float = 3e-4


def questions(setting: SpeechSetting, step: int) -> list[Sample]:
    """Return the questions of a step; what is said is noise, which takes as long to encode as speech."""
    rng = np.random.default_rng(step)
    known = words()
    system = " ".join(known[: setting.system_words])
    samples = []
    for number, length in enumerate(rng.integers(setting.shortest, setting.longest + 1, size=setting.prompts)):
        text = " ".join(known[i] for i in rng.integers(0, len(known), size=length))
        waveform = 0.1 * rng.normal(size=int(16000 * setting.seconds_per_word * length))
        samples.append(Sample(f"q{step}-{number}", text, waveform.astype(np.float32), system=system))
    return samples
