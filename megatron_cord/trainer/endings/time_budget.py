"""The time that a run may take: whether it suffices for another step, and for what ends the run behind it.

Counted is what the processes of a run spend, all starts together, evaluations and checkpoints included; what a start
did after its last checkpoint counts only for that start. What comes is taken to last as long as the longest of its kind
so far, with a fifth more for what ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

Phase = Literal["step", "checkpoint", "evaluation"]
_MARGIN = 1.2  #: of the time of the last checkpoint and of the last evaluation
_UNKNOWN = 0.05  #: of the whole time, kept free for each of them that has not been measured yet


class TimeBudget:
    """The time budget of a run on one rank.

    Args:
        hours: of the whole run; 0 has no end.
        spent: seconds that earlier starts have spent.
        longest: seconds of the longest step, checkpoint and evaluation of earlier starts.
    """

    def __init__(self, hours: float, spent: float = 0.0, longest: Mapping[str, float] | None = None) -> None:
        self._seconds, self._begun = 3600 * hours, time.monotonic() - spent
        self.longest: dict[str, float] = dict(longest or {})

    @property
    def spent(self) -> float:
        """Seconds that the run has taken so far, all starts together."""
        return time.monotonic() - self._begun

    def took(self, phase: Phase, seconds: float) -> None:
        """Take note of how long something lasted."""
        self.longest[phase] = max(seconds, self.longest.get(phase, 0.0))

    def is_over(self) -> bool:
        """Return whether another step, with the checkpoint and the evaluation that end the run, may last too long."""
        if not self._seconds:
            return False
        unknown = _UNKNOWN * self._seconds
        end = sum(self.longest.get(phase, unknown) for phase in ("checkpoint", "evaluation"))
        return self.spent + self.longest.get("step", 0.0) + _MARGIN * end > self._seconds
