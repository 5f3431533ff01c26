"""Scoring of responses by the rules of `megatron_cord.reward`, or of free answers by a judge.

A response that names no choice, or two of them, is not right; how many named none is counted, since a model that does
not answer in the asked form looks like one that does not know. Responses may be any text: nothing here raises, and
every length is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.reward.comparison import Comparer, Comparison, match_answers


@dataclass(frozen=True)
class Score:
    """The answer found in a response, None for none, and whether it is right."""

    answer: str | None
    correct: bool


def score_responses(
    gold: Sequence[str],
    choices: Sequence[Sequence[str]],
    responses: Sequence[str],
    questions: Sequence[str],
    comparer: Comparer | None,
) -> list[Score]:
    """Return one score a response, in the same order.

    Args:
        gold: right answers; letters where there are choices.
        choices: the texts behind the letters; empty for free answers.
        responses: of the model.
        questions: their texts, for the comparer.
        comparer: decides about free answers, a `Judge` for example; None goes by rules.
    """
    scores = [_score(g, c, r) for g, c, r in zip(gold, choices, responses, strict=True)]
    if comparer is None:
        return scores
    free = [i for i, offered in enumerate(choices) if not offered]
    verdicts = comparer.compare([Comparison(questions[i], responses[i], gold[i], bare=True) for i in free])
    for i, verdict in zip(free, verdicts, strict=True):
        # Where a judge gave no answer, the rules that hold without one decide.
        scores[i] = scores[i] if verdict.source == "fallback" else Score(scores[i].answer, verdict.agrees)
    return scores


def is_correct(gold: str, choices: Sequence[str], response: str) -> bool:
    """Return whether one response is right, by rules."""
    return _score(gold, choices, response).correct


def _score(gold: str, choices: Sequence[str], response: str) -> Score:
    match = match_answers(Comparison("", response, gold, bare=True, choices=tuple(choices)))
    return Score(match.answer, match.agrees)
