"""Answer matching as a comparer."""

from __future__ import annotations

import threading

from megatron_cord.reward import Answered, AnswerMatcher, Comparison, Rewards, Verdict
from megatron_cord.reward.rewards import TermWeights


def compare(response: str, reference: str, *, bare: bool = False) -> bool:
    (verdict,) = AnswerMatcher().compare([Comparison("how much", response, reference, bare)])
    assert verdict == Verdict(verdict.agrees, verdict.agrees, "match")
    return verdict.agrees


def test_agreement_is_of_final_answers() -> None:
    """Catches a reward for position or wording instead of the final answer, and one for two texts without any."""
    assert compare("five plus seven is twelve . the answer is 12", "seven plus five is twelve . the answer is 12")
    assert compare("so it is twelve", "the answer is 12")
    for response, reference in [("the answer is 11", "the answer is 12"), ("hm", "hm"), ("hm", "the answer is 12")]:
        assert not compare(response, reference)
    assert AnswerMatcher().compare([]) == []


def test_a_bare_reference_is_the_answer_itself() -> None:
    """Catches gold answers in words, in which no solution's final answer can be found, that agree with nothing."""
    assert compare("the answer is Paris", "Paris", bare=True)
    assert not compare("the answer is Rome", "Paris", bare=True)


def test_works_outside_the_main_thread() -> None:
    """Catches a comparison that uses signals, which a worker thread may not set."""
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(compare(r"\boxed{x+1}", r"\boxed{1+x}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


METALS = ("iron", "wood", "natural gas")


def test_choices_reach_the_comparison() -> None:
    """Catches choices that are lost on the way to the reward: a letter with its reason, and another wording."""
    responses = ["The answer is B because it burns.", "option b", r"\boxed{\text{B}}", "It is wood.", "C or B", "C"]
    for reference, bare in [("B", True), ("So the answer is wood.", False), ("**B**, wood", False)]:
        comparisons = [Comparison("which", response, reference, bare, METALS) for response in responses]
        assert [verdict.agrees for verdict in AnswerMatcher().compare(comparisons)] == [True] * 4 + [False] * 2
        answered = [Answered("s", "which", response, True, reference, "B", METALS) for response in responses]
        scores = Rewards(TermWeights(agreement=1.0, gold=1.0)).score(answered)
        assert [score.total for score in scores] == [2.0] * 4 + [0.0] * 2
