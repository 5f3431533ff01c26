"""What both trainers of `benchmarks.train` are told, and the clock that both use. It imports neither of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Of one run. Prompts are twice as long as responses: 10 s of audio are 250 tokens, a response at most 200."""

    prompts: int = 16  #: a step, one response each
    shortest: int = 96  #: words of a question
    longest: int = 160
    new_tokens: int = 64
    skipped_steps: int = 2  #: at the beginning, not timed
    steps: int = 6
    learning_rate: float = 1e-4


class Clock:
    """Seconds by phase, of the steps that are timed: of this process's CPU, so that other programs on the machine do not count; with
    ``wall``, for work that a GPU does, by the clock on the wall.
    """

    def __init__(self, *, wall: bool) -> None:
        self._now = time.perf_counter if wall else time.process_time
        self.phases: dict[str, float] = defaultdict(float)
        self.running = False
        self._begun = 0.0

    def start(self) -> None:
        """From here on time counts."""
        self.running, self._begun = True, self._now()

    def seconds(self) -> float:
        """Since the start."""
        return self._now() - self._begun

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a phase."""
        begun = self._now()
        yield
        if self.running:
            self.phases[name] += self._now() - begun
