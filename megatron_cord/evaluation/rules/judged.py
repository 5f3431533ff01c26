"""Scores by a language model: ratings of open answers, and comparison with a reference, as VoiceBench has them.

VoiceBench (arXiv 2410.17196, `api_judge.py`) draws three verdicts of gpt-4o-mini at temperature 0.5 and takes their
mean, or the majority. Here the judge of `reward.judge` gives one at temperature 0, in JSON, by this project's prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cord.errors import CordError
from megatron_cord.evaluation.rules.rule import Reply, Score
from megatron_cord.reward import Comparison, Judge, OpenAnswer

_HIGHEST = 5


def _present(judge: Judge | None) -> Judge:
    if judge is None:
        raise CordError("this set is scored by a judge; set reward.judge.base_url and reward.judge.model")
    return judge


class Rated:
    """Open questions: the score is the mean rating as a share of 5, as VoiceBench's overall score takes it."""

    judged = True

    def score(self, replies: Sequence[Reply], judge: Judge | None) -> list[Score]:
        """Return the scores; right is what has the highest rating."""
        ratings = _present(judge).rate([OpenAnswer(reply.question, reply.response) for reply in replies])
        return [Score(str(r), r == _HIGHEST, r / _HIGHEST, {"rating": float(r)}) for r in ratings]


class Referenced:
    """Questions with a reference answer in words, as SD-QA has them; what the judge leaves open ends the scoring."""

    judged = True

    def score(self, replies: Sequence[Reply], judge: Judge | None) -> list[Score]:
        """Return the scores."""
        verdicts = _present(judge).compare([Comparison(r.question, r.response, r.answer, bare=True) for r in replies])
        if missing := sum(verdict.source == "fallback" for verdict in verdicts):
            raise CordError(
                f"the judge gave no verdict on {missing} of {len(replies)} responses; the others are kept: start again "
                "when it answers"
            )
        return [Score("yes" if verdict.agrees else "no", verdict.agrees) for verdict in verdicts]
