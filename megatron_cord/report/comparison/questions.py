"""Held-out questions that some of the runs heard rightly and others did not, with their recordings.

Questions are drawn by a hash of their id, so that the same runs give the same page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.report.run.contents import Answer, RunContents

MOST = 8  #: on one page


@dataclass(frozen=True)
class DividingQuestion:
    """One question and each run's last answer to it; None from a run that was not asked it."""

    question: Answer
    answers: tuple[Answer | None, ...]


def dividing_questions(runs: Sequence[RunContents]) -> list[DividingQuestion]:
    """Return up to `MOST` questions, those that divide the runs most evenly first."""
    asked = [{a.id: a for a in run.outcome.answers} if run.outcome else {} for run in runs]
    found = []
    for name in dict.fromkeys(name for answers in asked for name in answers):
        answers = tuple(some.get(name) for some in asked)
        given = [answer for answer in answers if answer is not None]
        right = sum(answer.audio_correct for answer in given)
        if 0 < right < len(given) and len({answer.question for answer in given}) == 1:
            digest = hashlib.sha256(name.encode()).digest()
            found.append((abs(2 * right - len(given)), digest, DividingQuestion(given[0], answers)))
    return [question for _, _, question in sorted(found, key=lambda item: item[:2])[:MOST]]
