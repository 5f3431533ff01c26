"""The reward of a response: a weighted sum of terms.

- agreement: r(y) = J(y, ŷ) in {0, 1}, ŷ the teacher's answer to the written question: the paper's reward (CORD, arXiv 2601.16547), which
  knows nothing of gold answers;
- gold: the same with the data's own answer;
- format: 1 for a response that ends by itself and says which answer is its final one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.reward.answers import states_answer
from megatron_cord.reward.comparison import AnswerMatcher, Comparer, Comparison, Verdict
from megatron_cord.reward.judge.judge import Judge, JudgeConfig


@dataclass(frozen=True)
class TermWeights:
    """How much each term counts; one of weight 0 is not computed."""

    agreement: float = 1.0  #: the final answer is the teacher's
    gold: float = 0.0  #: the final answer is the data's
    format: float = 0.0  #: the response ends by itself and names its final answer

    def __post_init__(self) -> None:
        if not any(asdict(self).values()):
            raise CordError("reward.terms are all 0: there is no reward; set one, or objective.policy_gradient.enabled=false")


@dataclass(frozen=True)
class RewardConfig:
    """How a rollout is judged."""

    terms: TermWeights = field(default_factory=TermWeights)
    comparer: Literal["match", "judge"] = (
        "match"  #: who compares answers: rules, or a language model behind an endpoint
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        if self.comparer == "judge" and not (self.judge.base_url and self.judge.model):
            raise CordError("reward.comparer=judge needs reward.judge.base_url and reward.judge.model")


@dataclass(frozen=True)
class Answered:
    """A response and what it is judged by.

    Attributes:
        sample_id: names the sample in errors.
        question: its text.
        response: what the student said, decoded.
        ended: it ended by itself, not at the length limit.
        teacher_answer: the teacher's text.
        gold: the data's answer; None if it has none.
    """

    sample_id: str
    question: str
    response: str
    ended: bool
    teacher_answer: str
    gold: str | None


@dataclass(frozen=True)
class Score:
    """A response's reward.

    Attributes:
        total: the weighted sum.
        terms: each term that counts, unweighted.
        judged: comparisons that the judge decided.
        disagreements: those of them that answer matching would have decided otherwise.
        fallbacks: comparisons that answer matching decided because the judge gave no answer.
    """

    total: float
    terms: dict[str, float]
    judged: int = 0
    disagreements: int = 0
    fallbacks: int = 0


class Scorer(Protocol):
    """Gives each response its reward."""

    def score(self, answered: Sequence[Answered]) -> list[Score]:
        """One score each, in the same order."""
        ...


class Rewards:
    """The configured sum.

    Args:
        terms: weights.
        comparer: decides whether answers agree.
    """

    def __init__(self, terms: TermWeights | None = None, comparer: Comparer | None = None) -> None:
        self.terms, self.comparer = terms or TermWeights(), comparer or AnswerMatcher()

    def score(self, answered: Sequence[Answered]) -> list[Score]:
        """One score each, in the same order.

        Raises:
            CordError: a sample without a gold answer, where that counts; and what the judge raises.
        """
        comparisons: list[Comparison] = []
        if self.terms.agreement:
            comparisons += [Comparison(a.question, a.response, a.teacher_answer) for a in answered]
        if self.terms.gold:
            comparisons += [Comparison(a.question, a.response, _gold(a), bare=True) for a in answered]
        verdicts = self.comparer.compare(comparisons)
        rest = iter(verdicts)
        agreement = [next(rest) for _ in answered] if self.terms.agreement else None
        gold = [next(rest) for _ in answered] if self.terms.gold else None
        scores = []
        for index, each in enumerate(answered):
            compared = {"agreement": agreement and agreement[index], "gold": gold and gold[index]}
            scores.append(self._score(each, {name: verdict for name, verdict in compared.items() if verdict}))
        return scores

    def _score(self, answered: Answered, verdicts: dict[str, Verdict]) -> Score:
        terms = {name: float(verdict.agrees) for name, verdict in verdicts.items()}
        if self.terms.format:
            terms["format"] = float(answered.ended and states_answer(answered.response))
        judged = [v for v in verdicts.values() if v.source == "judge"]
        return Score(
            total=sum(getattr(self.terms, name) * value for name, value in terms.items()),
            terms=terms,
            judged=len(judged),
            disagreements=sum(v.agrees != v.matched for v in judged),
            fallbacks=sum(v.source == "fallback" for v in verdicts.values()),
        )


class CollectiveRewards:
    """Rewards whose calls are collective: each rank scores its share, so that a judge is asked once and all ranks hear the same.

    Args:
        rewards: this rank's own.
    """

    def __init__(self, rewards: Scorer) -> None:
        self._rewards = rewards

    def score(self, answered: Sequence[Answered]) -> list[Score]:
        """All ranks pass the same and get the same, in the same order."""
        rank, world = dist.get_rank(), dist.get_world_size()
        shares = all_gather_json([asdict(score) for score in self._rewards.score(answered[rank::world])])
        return [Score(**shares[i % world][i // world]) for i in range(len(answered))]


def build_rewards(config: RewardConfig, directory: Path) -> CollectiveRewards:
    """What the configuration asks for; a judge keeps its answers in the run's directory."""
    comparer = (
        Judge(config.judge, directory / "judge_cache", writer=dist.get_rank())
        if config.comparer == "judge"
        else AnswerMatcher()
    )
    return CollectiveRewards(Rewards(config.terms, comparer))


def _gold(answered: Answered) -> str:
    if answered.gold is None:
        raise CordError(
            f"sample {answered.sample_id} has no answer, and reward.terms.gold needs one; set it to 0 or mend the data"
        )
    return answered.gold
