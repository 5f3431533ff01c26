"""Answer matching as a comparer."""

from __future__ import annotations

import threading

from megatron_cord.reward import AnswerMatcher, Comparison, Verdict


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
