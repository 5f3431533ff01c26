"""Steps 2 and 3 of the loop: requests of a batch, and the rewards of the responses to them.

Each data-parallel rank does this for its own share of the step's samples; its ranks then know all rollouts of the step,
which are exchanged as JSON without audio. Every random draw comes from (seed, step, sample, rollout) alone, so a
resumed run, and any layout, draws what an uninterrupted one on one rank would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_cord.data.loader import Batch
from megatron_cord.data.samples import READ, PreparedSample, ViewName
from megatron_cord.losses import group_advantages, has_reward_variance
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.reward import Answered, Score
from megatron_cord.reward.rewards import Scorer
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.types import GenerationRequest, Role, Rollout, ScoredRollout
from megatron_cord.trainer.alignment.aligner import Aligner, GroupedResponse
from megatron_cord.trainer.answers.given_responses import GivenResponses
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.teachers import TeacherRoutes


def draw_seed(*parts: int | str) -> int:
    """Return a 48-bit seed that depends on all parts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:6], "big")


class Collector:
    """Makes a batch's requests, rewards the responses, and builds sequences. All ranks of a replica call it alike.

    Args:
        config: numbers and temperatures.
        objective: decides which responses are needed.
        answers: the teacher's reference answers.
        rewards: of responses; collective over the replica.
        seed: of the run.
        routes: which teacher scores a sample; None: the run's own scores all.
        given: makes the responses of streams whose source is the data; None where there is none.
        aligner: adds rewards of how alike two streams' responses are; None where there are none.
        compares: whether any reward compares with the teacher's answers (`ObjectiveConfig.compares`); else there are
            none, unless they are what is trained on.
    """

    def __init__(
        self,
        config: RolloutConfig,
        objective: ObjectiveConfig,
        answers: ReferenceAnswers,
        rewards: Scorer,
        seed: int,
        routes: TeacherRoutes | None = None,
        given: GivenResponses | None = None,
        aligner: Aligner | None = None,
        *,
        compares: bool = True,
    ) -> None:
        self.config, self.objective = config, objective
        self.answers, self.rewards, self.seed = answers, rewards, seed
        self._routes, self._given = TeacherRoutes({}) if routes is None else routes, given
        self.aligner, self._compares = aligner, compares

    @property
    def views(self) -> tuple[ViewName, ...]:
        """The views that samples are prepared for: the student's, and those of the teacher that a step needs."""
        answers_now = self.answers.mode == "live" and self.answered_per_step > 0
        return tuple(dict.fromkeys((*self.objective.views, *((READ,) if answers_now else ()))))

    @property
    def answered_per_step(self) -> int:
        """So many of a step's samples, from its first, need the teacher's answer."""
        if self.objective.responses == "teacher":
            return self.config.prompts_per_step
        if not (self.objective.policy_gradient.enabled and self._compares):
            return 0
        tried = self.config.policy_prompts_per_step * (1 + self.config.dynamic_sampling)
        return min(tried, self.config.prompts_per_step)

    def requests(self, batch: Batch) -> list[GenerationRequest]:
        """Return what to generate for a batch: responses for L_tok, groups for L_seq, a live teacher's answers."""
        alone, policy = self._parts(batch)
        requests = [self._request(batch, p, draw, self.config.temperature) for p, draw in alone]
        requests += self._group_requests(batch, policy)
        return requests + self.answers.requests(self._answered(batch, policy))

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Return the batch's rollouts with rewards, from the responses to `requests`. Collective over the replica."""
        if self.objective.responses == "teacher":
            answers = self.answers.rollouts(batch.samples, rollouts)
            return [
                self._scored(batch, position, 0, rollout, "distill", sampled=False)
                for position, rollout in zip(batch.positions, answers, strict=True)
            ]
        alone, policy = self._parts(batch)
        groups = len(alone) + len(policy) * len(self._draws)
        scored = [
            self._scored(batch, position, draw, rollout, "distill")
            for (position, draw), rollout in zip(alone, rollouts, strict=False)
        ]
        scored += self._given_responses(batch)
        if policy:
            references = self._references(batch, policy, rollouts[groups:])
            scored += self._groups(batch, policy, rollouts[len(alone) : groups], references)
        return scored

    def more_requests(self, batch: Batch, positions: Sequence[int]) -> list[GenerationRequest]:
        """Return what to generate for groups of further samples (dynamic sampling)."""
        return self._group_requests(batch, positions) + self.answers.requests(self._answered(batch, positions))

    def more_groups(self, batch: Batch, positions: Sequence[int], rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Return the groups of `more_requests` with their rewards. Collective over the replica."""
        groups = len(positions) * len(self._draws)
        references = self._references(batch, positions, rollouts[groups:])
        return self._groups(batch, positions, rollouts[:groups], references)

    def sequences(self, batch: Batch, rollouts: Sequence[ScoredRollout]) -> list[TrainingSequence]:
        """Return what this data-parallel rank trains on: L_seq is without zero-variance groups and what is filtered.

        Args:
            batch: this rank's share of the samples.
            rollouts: of the step on all ranks.
        """
        own = set(batch.positions)
        sequences = []
        for index, given in enumerate(rollouts):
            filtered = self.objective.filters(given)
            rollout = replace(given, advantage=0.0) if filtered else given
            if rollout.trained and rollout.position in own and (rollout.distilled or not filtered):
                prompts = batch.at(rollout.position).prompts
                if rollout.distilled:
                    term = self.objective.term_of(rollout.draw)
                    teacher = prompts[term.teacher] if term.distils else None
                    contrast = None if term.contrast is None else prompts[term.contrast.view]
                    taught_by = self._routes(term, batch.at(rollout.position).sample.id) if term.distils else ""
                    if term.rollout != term.student:  # its experts were chosen for another prompt
                        rollout = replace(rollout, rollout=replace(rollout.rollout, experts=None))
                    sequences.append(
                        TrainingSequence(prompts[term.student], teacher, rollout, index, term.name, contrast, taught_by)
                    )
                else:
                    policy = self.objective.policy_term_of(rollout.draw)
                    sequences.append(TrainingSequence(prompts[policy.student], None, rollout, index, policy.name))
        return sequences

    @property
    def _draws(self) -> tuple[int, ...]:
        """Numbers of the responses in a sample's groups, of all streams in turn."""
        groups = self.objective.groups(self.config.policy_rollouts)
        return tuple(draw for draws in groups.values() for draw in draws)

    @property
    def _has_groups(self) -> bool:
        return self.objective.policy_gradient.enabled and self.config.policy_prompts_per_step > 0

    def _parts(self, batch: Batch) -> tuple[list[tuple[int, int]], list[int]]:
        """Return position and number of each response for L_tok alone, and positions of samples that get a group."""
        if self.objective.responses == "teacher":
            return [], []
        policy = [p for p in batch.positions if self._has_groups and p < self.config.policy_prompts_per_step]
        shared = self.config.share and self._has_groups
        draws = () if shared else [d for d in self.objective.draws if self.objective.term_of(d).sampled]
        return [(position, draw) for position in batch.positions for draw in draws], policy

    def _given_responses(self, batch: Batch) -> list[ScoredRollout]:
        """Return the responses that the samples themselves give."""
        if self._given is None:
            return []
        terms = [(d, term) for d in self.objective.draws if not (term := self.objective.term_of(d)).sampled]
        return [
            self._scored(batch, p, draw, self._given.rollout(batch.at(p).sample, term.source), "distill", sampled=False)
            for p in batch.positions
            for draw, term in terms
        ]

    def _answered(self, batch: Batch, policy: Sequence[int]) -> list[PreparedSample]:
        """Return the samples to which the step needs the teacher's answer."""
        if self.objective.responses == "teacher":
            return list(batch.samples)
        return [batch.at(p) for p in policy] if self._compares else []

    def _references(self, batch: Batch, positions: Sequence[int], generated: Sequence[Rollout]) -> list[str | None]:
        """Return the teacher's answer to each sample with a group; None for all where no reward compares with it."""
        if not self._compares:
            return [None] * len(positions)
        return [answer.text for answer in self.answers.rollouts(self._answered(batch, positions), generated)]

    def _request(self, batch: Batch, position: int, draw: int, temperature: float) -> GenerationRequest:
        sample = batch.at(position)
        seed = self._seed(batch.step, sample, draw)
        config = self.config
        objective = self.objective
        view = objective.policy_term_of(draw).student if draw > 0 else objective.term_of(draw).rollout
        prompt = sample.prompts[view]
        return GenerationRequest(
            prompt, temperature, config.max_new_tokens, seed, config.top_p, config.top_k, config.router_replay
        )

    def _group_requests(self, batch: Batch, positions: Sequence[int]) -> list[GenerationRequest]:
        temperature = self.config.policy_temperature
        return [self._request(batch, p, draw, temperature) for p in positions for draw in self._draws]

    def _seed(self, step: int, sample: PreparedSample, draw: int) -> int:
        return draw_seed(self.seed, step, sample.sample.id, draw)

    def _scored(
        self,
        batch: Batch,
        position: int,
        draw: int,
        rollout: Rollout,
        role: Role,
        *,
        sampled: bool = True,
        **known: Any,
    ) -> ScoredRollout:
        prepared = batch.at(position)
        return ScoredRollout(
            rollout,
            role,
            prepared.sample.asked,
            prepared.sample.voice,
            position,
            draw,
            seed=self._seed(batch.step, prepared, draw) if sampled else None,
            **known,
        )

    def _groups(
        self, batch: Batch, positions: Sequence[int], rollouts: Sequence[Rollout], references: Sequence[str | None]
    ) -> list[ScoredRollout]:
        """Rewards and advantages; rollouts come sample by sample, and of each stream by stream."""
        role: Role = "shared" if self.config.share else "policy"
        owners = [
            (position, draw, reference)
            for position, reference in zip(positions, references, strict=True)
            for draw in self._draws
        ]
        answered = [
            Answered(s.id, s.asked, r.text, r.finish_reason == "stop", reference or "", s.answer, s.choices)
            for (position, _, reference), r in zip(owners, rollouts, strict=True)
            for s in (batch.at(position).sample,)
        ]
        streams = [self.objective.policy_term_of(draw).name for _, draw, _ in owners]
        scores = self._scores(answered, streams)
        if self.aligner is not None:
            views = {term.name: term.student for term in self.objective.policy_terms}
            scores = self.aligner.scores(
                [
                    GroupedResponse(position, stream, batch.at(position).prompts[views[stream]], rollout, score)
                    for (position, _, _), stream, rollout, score in zip(owners, streams, rollouts, scores, strict=True)
                ]
            )
        rewards = torch.tensor([score.total for score in scores])
        keys = [(position, stream) for (position, _, _), stream in zip(owners, streams, strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        group_ids = torch.tensor([numbers[key] for key in keys], dtype=torch.int64)
        normalize_std = self.objective.policy_gradient.normalize_std
        advantages = group_advantages(rewards, group_ids, normalize_std=normalize_std).tolist()
        varied = has_reward_variance(rewards, group_ids).tolist()
        return [
            self._scored(
                batch, position, draw, rollout, role, reference_answer=reference, reward=score.total, score=score,
                advantage=advantage, zero_variance=not varies,
            )
            for (position, draw, reference), rollout, score, advantage, varies in zip(
                owners, rollouts, scores, advantages, varied, strict=True
            )
        ]  # fmt: skip

    def _scores(self, answered: Sequence[Answered], streams: Sequence[str]) -> list[Score]:
        """Return a score for each response, by the reward of its stream."""
        scores: dict[int, Score] = {}
        for term in self.objective.policy_terms:
            own = [index for index, stream in enumerate(streams) if stream == term.name]
            scores |= zip(own, self.rewards.score([answered[index] for index in own], term.reward), strict=True)
        return [scores[index] for index in range(len(answered))]


def gather_rollouts(rollouts: Sequence[ScoredRollout], replica_group: dist.ProcessGroup) -> list[ScoredRollout]:
    """Return the step's rollouts of all data-parallel ranks, in one order. Collective over all ranks.

    Experts are not exchanged: a rank trains on its own rollouts.

    Args:
        rollouts: of this data-parallel rank, the same on all ranks of its replica.
        replica_group: those ranks; the first of them sends.
    """
    sends = dist.get_rank(replica_group) == 0
    bare = [replace(each, rollout=replace(each.rollout, experts=None)) for each in rollouts]
    shares = all_gather_json([rollout.to_json() for rollout in bare] if sends else [])
    gathered = (ScoredRollout.from_json(plain) for share in shares for plain in share)
    experts = {each.order: each.rollout.experts for each in rollouts}
    whole = (replace(g, rollout=replace(g.rollout, experts=experts.get(g.order))) for g in gathered)
    return sorted(whole, key=lambda rollout: rollout.order)
