"""Scores: responses as models write them, in their usual and unusual forms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.evaluation.scoring import is_correct, score_responses
from megatron_cord.reward.comparison import AnswerMatcher, Comparison, Verdict

METALS = ("iron", "wood", "natural gas", "gas")


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("72", "She has 48 + 24 = 72 clips. #### 72", True),
        ("72", "The answer is seventy two.", True),
        ("72", "The answer is 73.", False),
        ("Paris", "It is Paris.", True),
        ("Paris", "The answer is London, not Paris.", False),
        ("Paris", "Parish churches", False),
        ("Yes", "yes", True),
        ("0.5", r"\boxed{\frac{1}{2}}", True),
        ("72", "", False),
    ],
)
def test_free_answers(gold: str, response: str, right: bool) -> None:
    """Catches a gold word that counts inside another word, or although the response states another answer."""
    assert is_correct(gold, (), response) is right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("It is Paris.", True),
        ("It is not Paris.", False),
        ("It is Paris or Rome.", False),
        ("The answer is Rome.", False),
    ],
)
def test_rewards_decide_alike(response: str, right: bool) -> None:
    """Catches an answer in words that is right in an evaluation and gets no reward, or one that is denied."""
    (verdict,) = AnswerMatcher().compare([Comparison("which", response, "Paris", bare=True)])
    assert is_correct("Paris", (), response) is verdict.agrees is right


class _Judge:
    def __init__(self) -> None:
        self.asked: list[Comparison] = []

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += comparisons
        return [
            Verdict(c.response == "so be it", False, "fallback" if c.response == "away" else "judge")
            for c in comparisons
        ]


def test_a_judge_decides_on_free_answers_alone() -> None:
    """Catches choices sent to a judge, verdicts of another response, and missing verdicts that count as wrong."""
    judge = _Judge()
    scores = score_responses(
        ["A", "4", "4", "away"], [METALS, (), (), ()], ["A", "so be it", "4", "away"], ["q1", "q2", "q3", "q4"], judge
    )
    assert [score.correct for score in scores] == [True, True, False, True]
    assert [(c.question, c.reference, c.bare) for c in judge.asked] == [
        ("q2", "4", True),
        ("q3", "4", True),
        ("q4", "away", True),
    ]


@settings(max_examples=300, deadline=3000)
@given(
    response=st.text(max_size=400) | st.text("AB().:\\boxed{}# answeris\n", max_size=200),
    gold=st.text(min_size=1, max_size=20),
)
def test_any_text_has_a_score(response: str, gold: str) -> None:
    """Catches an exception or a hang on what a model may babble."""
    assert is_correct("A", METALS, response) in {True, False}
    assert is_correct(gold, (), response) in {True, False}
