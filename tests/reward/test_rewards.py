"""The reward as a sum of terms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_cord.errors import CordError
from megatron_cord.reward import Answered, Comparison, Rewards, Verdict, states_answer
from megatron_cord.reward.rewards import TermWeights


def answered(response: str, *, ended: bool = True, gold: str | None = "12") -> Answered:
    return Answered("s", "how much", response, ended, "the answer is 11", gold)


def test_terms_are_weighted() -> None:
    """Catches a term under another's weight, gold answers in place of the teacher's, and a format without an end."""
    rewards = Rewards(TermWeights(agreement=1.0, gold=0.5, format=0.25))
    scores = rewards.score(
        [
            answered("the answer is 11"),
            answered("the answer is 12"),
            answered("12"),
            answered("the answer is 12", ended=False),
        ]
    )
    assert [s.terms for s in scores] == [
        {"agreement": a, "gold": g, "format": f} for a, g, f in [(1, 0, 1), (0, 1, 1), (0, 1, 0), (0, 1, 0)]
    ]
    assert [s.total for s in scores] == [1.25, 0.75, 0.5, 0.5]
    assert Rewards().score([answered("the answer is 11")])[0].terms == {"agreement": 1.0}


def test_gold_needs_gold() -> None:
    """Catches a sample without an answer that counts as wrong; without that term it is fine."""
    with pytest.raises(CordError, match="sample s has no answer"):
        Rewards(TermWeights(gold=1.0)).score([answered("12", gold=None)])
    assert Rewards().score([answered("11", gold=None)])[0].total == 1.0


class Scripted:
    """Disagrees with the matcher about the first comparison, and gives up on the last."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        middle = [Verdict(True, True, "judge") for _ in comparisons[1:-1]]
        return [Verdict(True, False, "judge"), *middle, Verdict(False, False, "fallback")]


def test_what_became_of_the_judge_is_counted() -> None:
    """Catches disagreements and fallbacks beside another response."""
    scores = Rewards(TermWeights(gold=1.0), Scripted()).score([answered("a"), answered("b")])
    assert [(s.judged, s.disagreements, s.fallbacks, s.total) for s in scores] == [(2, 1, 0, 2.0), (1, 0, 1, 1.0)]


@pytest.mark.parametrize("text", [r"so \boxed{3}", "#### 3", "The answer is three.", "answer: 3"])
def test_an_answer_is_stated(text: str) -> None:
    """Catches a marker that does not count, or one without an answer."""
    assert states_answer(text) and not states_answer("so it is 3") and not states_answer(r"\boxed{}")
