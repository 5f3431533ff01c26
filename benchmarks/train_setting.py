"""The setting and the clock of both trainers of `benchmarks.train`. It imports neither of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One run. Prompts are twice as long as responses: 10 s of audio are 250 tokens, a response at most 200."""

    dtype: str = "float32"  #: of the models
    prompts: int = 16  #: a step, one response each
    shortest: int = 96  #: words of a question
    longest: int = 160
    new_tokens: int = 64
    skipped_steps: int = 2  #: at the beginning, not timed
    steps: int = 6
    learning_rate: float = 1e-4


#: What is trained, by the name of the models: of SmolLM2 questions of one sentence, answers of one short sentence.
SETTINGS = {
    "qwen2_audio_small": Setting(),
    "smollm2": Setting(shortest=16, longest=24, new_tokens=12, skipped_steps=1, steps=3),
}


class Clock:
    """Seconds by phase, of the steps that are timed.

    CPU seconds of this process, so that other programs on the machine do not count; with ``wall``, for work on a GPU,
    wall-clock seconds.
    """

    def __init__(self, *, wall: bool) -> None:
        self._now = time.perf_counter if wall else time.process_time
        self.phases: dict[str, float] = defaultdict(float)
        self.running = False
        self._begun = 0.0

    def start(self) -> None:
        """Begin to count."""
        self.running, self._begun = True, self._now()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return self._now() - self._begun

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        begun = self._now()
        yield
        if self.running:
            self.phases[name] += self._now() - begun
