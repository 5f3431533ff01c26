"""Steps 2 and 3 of the loop: rollouts of a step's prompts, their rewards, and the sequences that they make for training.

Every random draw comes from (seed, step, sample, rollout) alone, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.errors import CordError
from megatron_cord.losses import group_advantages, has_reward_variance
from megatron_cord.reward.rewards import Answered, Score, Scorer
from megatron_cord.rollout.engines import EngineConfig
from megatron_cord.rollout.schedule import ScheduleConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout
from megatron_cord.trainer.reference_answers import TeacherAnswers
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig


@dataclass(frozen=True)
class RolloutConfig(ScheduleConfig, EngineConfig):
    """How many responses a step samples, how, when, and from which engine."""

    prompts_per_step: int = 32  #: each gives one response to L_tok
    temperature: float = 1.0  #: of the responses for L_tok
    policy_prompts_per_step: int = 8  #: the first of the step's prompts also give groups to L_seq
    policy_rollouts: int = 4  #: N, responses a group
    policy_temperature: float = 1.5  #: of the responses for L_seq
    share: bool = False  #: L_tok scores the responses of L_seq instead of sampling its own
    max_new_tokens: int = 200  #: responses are cut there

    agreement_limit: float | None = 0.25
    #: mean |difference| of trainer's and engine's log-probabilities, nats a token, beyond which a step stops the run; null never does

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        if self.agreement_limit is not None and self.agreement_limit <= 0:
            raise CordError("rollout.agreement_limit must be positive, or null for none")
        if self.prompts_per_step < 1 or self.policy_rollouts < 2:
            raise CordError("rollout.prompts_per_step must be at least 1 and rollout.policy_rollouts at least 2")
        if not 0 <= self.policy_prompts_per_step <= self.prompts_per_step:
            raise CordError(
                f"rollout.policy_prompts_per_step ({self.policy_prompts_per_step}) must lie between 0 and rollout.prompts_per_step "
                f"({self.prompts_per_step})"
            )
        if self.temperature <= 0 or self.policy_temperature <= 0:
            raise CordError("rollout.temperature and rollout.policy_temperature must be positive")


@dataclass(frozen=True, eq=False)
class Collected:
    """One rollout with what is known about it.

    Attributes:
        sample: the question.
        role: "distill" for L_tok, "policy" for L_seq, "shared" for both.
        rollout: the response.
        teacher_answer: the teacher's text, which the reward compares with; None where no reward is given.
        reward: None likewise.
        score: what the reward is made of; None likewise, and in a replay.
        seed: that the response was sampled with; None for a teacher's, which is greedy.
        advantage: 0 outside L_seq and in zero-variance groups.
        has_reward_variance: whether its group's rewards differ.
    """

    sample: Sample
    role: Literal["distill", "policy", "shared"]
    rollout: Rollout
    teacher_answer: str | None = None
    reward: float | None = None
    advantage: float = 0.0
    has_reward_variance: bool = False
    score: Score | None = None
    seed: int | None = None


def draw_seed(*parts: int | str) -> int:
    """A 48-bit seed that depends on all parts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:6], "big")


class Collector:
    """Says what is to be generated for a step, rewards it, and builds sequences. All ranks call it alike.

    Args:
        config: numbers and temperatures.
        objective: decides which responses are needed.
        prompts: builds both prompts of a sample.
        answers: the teacher's answers.
        rewards: of responses.
        seed: of the run.
    """

    def __init__(
        self,
        config: RolloutConfig,
        objective: ObjectiveConfig,
        prompts: PromptBuilder,
        answers: TeacherAnswers,
        rewards: Scorer,
        seed: int,
    ) -> None:
        self.config, self.objective, self.prompts = config, objective, prompts
        self.answers, self.rewards, self.seed = answers, rewards, seed

    def requests(self, samples: Sequence[Sample], step: int) -> list[GenerationRequest]:
        """What an engine has to generate for the step: responses for L_tok, groups for L_seq, and a live teacher's answers."""
        alone, policy = self._parts(samples)
        spoken = {s.id: self.prompts.audio_prompt(s) for s in [*alone, *policy]}
        requests = [self._request(spoken[s.id], self.config.temperature, step, s, 0) for s in alone]
        requests += [
            self._request(spoken[s.id], self.config.policy_temperature, step, s, 1 + i)
            for s in policy
            for i in range(self.config.policy_rollouts)
        ]
        return requests + self.answers.requests(samples if self.objective.responses == "teacher" else policy)

    def collect(self, samples: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> list[Collected]:
        """The step's rollouts with their rewards, from what the engine made of `requests`."""
        if self.objective.responses == "teacher":
            answers = self.answers.rollouts(samples, rollouts)
            return [Collected(sample, "distill", rollout) for sample, rollout in zip(samples, answers, strict=True)]
        alone, policy = self._parts(samples)
        groups = len(alone) + len(policy) * self.config.policy_rollouts
        distilled = [
            Collected(s, "distill", r, seed=self._seed(step, s, 0)) for s, r in zip(alone, rollouts, strict=False)
        ]
        if not policy:
            return distilled
        references = self.answers.rollouts(policy, rollouts[groups:])
        role: Literal["shared", "policy"] = "shared" if self.config.share else "policy"
        return distilled + self._groups(policy, rollouts[len(alone) : groups], references, role, step)

    def _parts(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Samples that get a response for L_tok alone, and samples that get a group."""
        if self.objective.responses == "teacher":
            return [], []
        policy = list(samples[: self.config.policy_prompts_per_step]) if self.objective.policy_gradient.enabled else []
        share = self.config.share and bool(policy)
        return [] if share or self.objective.divergence.kind == "none" else list(samples), policy

    def sequences(self, collected: Sequence[Collected]) -> list[TrainingSequence]:
        """What is trained on: zero-variance groups are left out of L_seq."""
        made = []
        for index, item in enumerate(collected):
            scored = item.role != "policy"
            if scored or item.has_reward_variance:
                teacher = self.prompts.text_prompt(item.sample) if scored and self.objective.distils else None
                student = self.prompts.audio_prompt(item.sample)
                made.append(TrainingSequence(student, teacher, item.rollout, scored, item.advantage, index))
        return made

    def _request(self, prompt: Prompt, temperature: float, step: int, sample: Sample, draw: int) -> GenerationRequest:
        return GenerationRequest(prompt, temperature, self.config.max_new_tokens, self._seed(step, sample, draw))

    def _seed(self, step: int, sample: Sample, draw: int) -> int:
        return draw_seed(self.seed, step, sample.id, draw)

    def _groups(
        self,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        references: Sequence[Rollout],
        role: Literal["policy", "shared"],
        step: int,
    ) -> list[Collected]:
        """Rewards and advantages; rollouts come group by group."""
        owners = [
            (s, reference.text)
            for s, reference in zip(samples, references, strict=True)
            for _ in range(self.config.policy_rollouts)
        ]
        scores = self.rewards.score(
            [
                Answered(s.id, s.question, r.text, r.finish_reason == "stop", reference, s.answer)
                for (s, reference), r in zip(owners, rollouts, strict=True)
            ]
        )
        rewards = torch.tensor([score.total for score in scores])
        group_ids = torch.arange(len(samples)).repeat_interleave(self.config.policy_rollouts)
        advantages = group_advantages(rewards, group_ids, normalize_std=self.objective.policy_gradient.normalize_std).tolist()
        varied = has_reward_variance(rewards, group_ids).tolist()
        seeds = [self._seed(step, s, 1 + i % self.config.policy_rollouts) for i, (s, _) in enumerate(owners)]
        return [
            Collected(s, role, r, reference, score.total, advantage, differs, score, seed)
            for (s, reference), r, score, advantage, differs, seed in zip(
                owners, rollouts, scores, advantages, varied, seeds, strict=True
            )
        ]


def repetition(token_ids: Sequence[int], size: int = 4) -> float:
    """The share of a response's n-grams of this size that it has said before: 0 for plain text, near 1 for a loop, 0 if it is too short to tell."""
    grams = [tuple(token_ids[i : i + size]) for i in range(len(token_ids) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > size else 0.0


def collection_metrics(collected: Sequence[Collected], policy_rollouts: int) -> dict[str, float]:
    """How responses end and how much they repeat themselves; with L_seq also the reward with its terms, groups, and the judge's share."""
    metrics = {
        "truncated": sum(c.rollout.finish_reason == "length" for c in collected) / max(len(collected), 1),
        "repetition": sum(repetition(c.rollout.token_ids) for c in collected) / max(len(collected), 1),
    }
    rewarded = [c for c in collected if c.reward is not None]
    if not rewarded:
        return metrics
    metrics |= {
        "reward": sum(c.reward for c in rewarded if c.reward is not None) / len(rewarded),
        "groups": len(rewarded) / policy_rollouts,
        "zero_variance_groups": sum(not c.has_reward_variance for c in rewarded) / policy_rollouts,
    }
    scores = [c.score for c in rewarded if c.score is not None]
    names = list(scores[0].terms) if scores else []
    if len(names) > 1:
        metrics |= {f"reward_{name}": sum(s.terms[name] for s in scores) / len(scores) for name in names}
    judged, fallbacks = sum(s.judged for s in scores), sum(s.fallbacks for s in scores)
    if judged + fallbacks:
        metrics |= {
            "judge_fallbacks": fallbacks / (judged + fallbacks),
            "judge_disagreement": sum(s.disagreements for s in scores) / max(judged, 1),
        }
    return metrics
