"""The reward of a response: a weighted sum of terms.

- agreement: r(y) = J(y, ŷ) in {0, 1}, ŷ the teacher's answer to the written question: the paper's reward (CORD, arXiv
  2601.16547), which needs no gold answers;
- gold: the same with the data's own answer;
- format: 1 for a response that ends by itself and states which answer is its final one;
- reasoning: 1 where the model of reward.judge, such as a served teacher, finds the way to the answer sound (OPOD, arXiv
  2607.20918);
- layers, embedding: how alike a response is to a right one of another stream (TARS, arXiv 2601.05543), in the model's
  layers and in an embedding of its text; `trainer.alignment` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from megatron_cord.errors import CordError
from megatron_cord.reward.comparison import AnswerMatcher, Comparer, Comparison, Verdict
from megatron_cord.reward.embedding.config import EmbeddingConfig
from megatron_cord.reward.judge.judge import JudgeConfig
from megatron_cord.reward.judge.reasoning import Reasoning
from megatron_cord.reward.stated import states_answer


@dataclass(frozen=True)
class TermWeights:
    """How much each term counts; one of weight 0 is not computed."""

    agreement: float = 1.0  #: the final answer is the teacher's
    gold: float = 0.0  #: the final answer is the data's
    format: float = 0.0  #: the response ends by itself and states its final answer
    reasoning: float = 0.0  #: the model of reward.judge finds the steps to the answer sound
    #: cosine of the model's hidden states with a right response's of the stream align_with, the mean over layers
    layers: float = 0.0
    embedding: float = 0.0  #: cosine of the text's embedding with that of the same response; of reward.embedding

    def __post_init__(self) -> None:
        if not any(asdict(self).values()):
            raise CordError(
                "reward.terms are all 0: there is no reward; set one, or objective.policy_gradient.enabled=false"
            )


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a rollout."""

    terms: TermWeights = field(default_factory=TermWeights)
    comparer: Literal["match", "judge"] = "match"  #: compare answers by rules, or by a language model at an endpoint
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def __post_init__(self) -> None:
        if self.comparer == "judge" and not self.judge.is_given:
            raise CordError("reward.comparer=judge needs reward.judge.base_url and reward.judge.model")


@dataclass(frozen=True)
class Answered:
    """A response and what it is compared with.

    Attributes:
        sample_id: names the sample in errors.
        question: its text.
        response: the student's text.
        ended: it ended by itself, not at the length limit.
        teacher_answer: the teacher's text.
        gold: the data's answer; None if it has none.
        choices: the texts behind the letters that the question offers; empty for a question that offers none.
    """

    sample_id: str
    question: str
    response: str
    ended: bool
    teacher_answer: str
    gold: str | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """A response's reward.

    Attributes:
        total: the weighted sum.
        terms: each term that counts, unweighted.
        judged: comparisons that the judge decided.
        disagreements: those of them that answer matching would have decided otherwise.
        fallbacks: comparisons that answer matching decided because the judge gave no answer, and reasoning without a
            verdict.
        verified: verdicts of the judge on reasoning.
    """

    total: float
    terms: dict[str, float]
    judged: int = 0
    disagreements: int = 0
    fallbacks: int = 0
    verified: int = 0


class Verifier(Protocol):
    """Says whether reasoning is sound."""

    def verify(self, given: Sequence[Reasoning]) -> list[bool | None]:
        """Return one verdict each, in the same order; None for none."""
        ...


class Scorer(Protocol):
    """Computes the reward of each response."""

    def score(self, answered: Sequence[Answered], terms: TermWeights | None = None) -> list[Score]:
        """Return one score each, in the same order; ``terms`` take the place of the configured weights."""
        ...


class Rewards:
    """The configured sum.

    Args:
        terms: weights.
        comparer: decides whether answers agree.
        verifier: decides about reasoning; None where no reward has that.
    """

    def __init__(
        self, terms: TermWeights | None = None, comparer: Comparer | None = None, verifier: Verifier | None = None
    ) -> None:
        self.terms, self.comparer, self.verifier = terms or TermWeights(), comparer or AnswerMatcher(), verifier

    def score(self, answered: Sequence[Answered], terms: TermWeights | None = None) -> list[Score]:
        """Return one score each, in the same order.

        Args:
            answered: the responses.
            terms: weights in place of the configured ones.

        Raises:
            CordError: a sample without a gold answer, where that counts; and what the judge raises.
        """
        weights = self.terms if terms is None else terms
        comparisons: list[Comparison] = []
        if weights.agreement:
            comparisons += [Comparison(a.question, a.response, a.teacher_answer, choices=a.choices) for a in answered]
        if weights.gold:
            comparisons += [Comparison(a.question, a.response, _gold(a), True, a.choices) for a in answered]
        verdicts = iter(self.comparer.compare(comparisons))
        compared: dict[str, list[Verdict]] = {
            name: [next(verdicts) for _ in answered] for name in ("agreement", "gold") if getattr(weights, name)
        }
        sound: list[bool | None] = [None] * len(answered)
        if weights.reasoning:
            assert self.verifier is not None, "the configuration was verified"
            sound = self.verifier.verify([Reasoning(a.question, a.response, a.gold) for a in answered])
        return [
            _score(weights, response, {name: verdicts[index] for name, verdicts in compared.items()}, sound[index])
            for index, response in enumerate(answered)
        ]


def _score(weights: TermWeights, answered: Answered, verdicts: dict[str, Verdict], sound: bool | None) -> Score:
    terms = {name: float(verdict.agrees) for name, verdict in verdicts.items()}
    if weights.reasoning:
        terms["reasoning"] = float(sound or False)
    if weights.format:
        terms["format"] = float(answered.ended and states_answer(answered.response))
    judged = [v for v in verdicts.values() if v.source == "judge"]
    return Score(
        total=sum(getattr(weights, name) * value for name, value in terms.items()),
        terms=terms,
        judged=len(judged),
        verified=int(sound is not None),
        disagreements=sum(v.agrees != v.matched for v in judged),
        fallbacks=sum(v.source == "fallback" for v in verdicts.values()) + bool(weights.reasoning and sound is None),
    )


def _gold(answered: Answered) -> str:
    if answered.gold is None:
        raise CordError(
            f"sample {answered.sample_id} has no answer, and reward.terms.gold needs one; set it to 0 or add the answer"
        )
    return answered.gold
