"""The objective of a run: L = L_tok + L_seq, which of their variants, and what each is divided by.

Both may be sums over streams (`streams`). Dividing both terms by tokens instead of responses (``normalization``)
keeps their ratio where lengths are alike, and makes the learning rate independent of the length. ``microbatch_loss``
composes the terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_cord.data.samples import HEAR, READ
from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig, TokenWeightsConfig
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.rollout.types import ScoredRollout
from megatron_cord.trainer.step.streams import PolicyStream, Stream, StreamConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimized. The defaults are the paper's."""

    #: whose responses L_tok scores: the student's (on-policy) or the teacher's (off-policy)
    responses: Literal["student", "teacher"] = "student"
    #: which view (views) the student answers and is trained on
    student_view: str = HEAR
    #: which view the teacher scores the responses on; its reference answers are always to read
    teacher_view: str = READ
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)  #: D_t
    token_weights: TokenWeightsConfig = field(default_factory=TokenWeightsConfig)  #: w_t
    policy_gradient: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)  #: L_seq
    #: several terms by name, each with responses, views, a divergence or a reward, and a weight of its own: those of
    #: the kind distillation in place of the single term of L_tok that the keys here describe, those of the kind
    #: policy_gradient in place of the single one of L_seq
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    #: both losses are divided by the number of responses (response: the paper; response_mean: of means over each
    #: response's tokens) or of their tokens
    normalization: Literal["response", "response_mean", "token"] = "response"
    #: of a mixture of experts: what multiplies the loss that balances their load, summed over layers, a mean over
    #: sequences; 0: none
    router_aux_loss: float = 0.0
    #: how the divergence's gradient is formed; docs/loss.md compares them
    implementation: Literal["auto", "cached_grad", "fused", "recompute"] = "auto"
    #: what computes the divergence; auto compiles on a CPU where calls are large
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"

    def __post_init__(self) -> None:
        kind, policy = self.divergence.kind, self.policy_gradient.enabled
        if self.router_aux_loss < 0:
            raise CordError(f"objective.router_aux_loss cannot be negative, got {self.router_aux_loss:g}")
        if self.streams:
            self._check_streams()
        if self._named("distillation"):
            return
        if kind == "none" and not policy:
            raise CordError(
                "objective.divergence.kind is none and objective.policy_gradient.enabled is false: nothing is left to "
                "train on"
            )
        if self.responses == "teacher" and policy:
            raise CordError(
                "objective.policy_gradient.enabled needs objective.responses=student: the policy gradient is for the "
                "student's own rollouts"
            )
        if self.token_weights.needs_ratio and self.responses != "student":
            raise CordError(
                "objective.token_weights.factors=importance needs objective.responses=student: others were not "
                "sampled by its own weights"
            )
        if kind == "sampled" and self.responses == "teacher":
            raise CordError(
                "objective.divergence.kind=sampled needs objective.responses=student: it is an estimate from tokens "
                "that the student sampled"
            )

    def at(self, step: int) -> ObjectiveConfig:
        """Return the objective of the update after so many steps, with the policy gradient's weight of that step."""
        policy = self.policy_gradient
        if policy.weight_schedule.kind == "constant":
            return self
        return replace(self, policy_gradient=replace(policy, weight=policy.weight_schedule.at(policy.weight, step)))

    @property
    def terms(self) -> tuple[Stream, ...]:
        """The streams of L_tok in their order; the single one without a name is called ""."""
        named = self._named("distillation") or {"": StreamConfig()}
        return tuple(self._resolved(name, each) for name, each in named.items())

    @property
    def policy_terms(self) -> tuple[PolicyStream, ...]:
        """The streams of L_seq in their order; the single one without a name is called ""; none if L_seq is off."""
        if not self.policy_gradient.enabled:
            return ()
        named = self._named("policy_gradient").items()
        return tuple(
            PolicyStream(
                name, each.student or self.student_view, each.weight, each.responses, each.reward, each.align_with
            )
            for name, each in named
        ) or (PolicyStream("", self.student_view),)

    @property
    def draws(self) -> tuple[int, ...]:
        """Numbers of the responses that a prompt gets for L_tok alone, streams in turn: 0, −1, …; none if it is off."""
        if self.divergence.kind == "none" and not self._named("distillation"):
            return ()
        return tuple(range(0, -sum(term.responses for term in self.terms), -1))

    def term_of(self, draw: int) -> Stream:
        """Return the stream of a response, by its number; that of L_tok's part in groups, too."""
        terms = self.terms
        owners = [term for term in terms for _ in range(term.responses)]
        return terms[0] if draw > 0 else owners[-draw]

    def is_given(self, rollout: ScoredRollout) -> bool:
        """Return whether a response is a text of its sample."""
        return rollout.draw <= 0 and not self.term_of(rollout.draw).sampled

    def check_recorded(self, streams: Mapping[int, str | None], policy_rollouts: int, source: str) -> None:
        """Refuse a step's recorded responses that streams of other names or sizes made.

        Args:
            streams: of the responses by their numbers; None where the record does not say.
            policy_rollouts: N of the stream without a name.
            source: of the record.

        Raises:
            CordError: the record has other responses, or deals them to other streams.
        """
        known = {draw for group in self.groups(policy_rollouts).values() for draw in group}
        alone = {draw for draw in streams if draw <= 0}
        fits = alone == set(self.draws) and streams.keys() - alone <= known if self.streams else alone <= {0}
        if not fits:
            raise CordError(
                f"replay={source}: its responses are not those of objective.streams; replay with the streams, and "
                "their numbers of responses, of the recorded run"
            )
        own = {draw: self._stream_of_draw(draw) for draw in streams}
        paired = {(draw > 0, name, own[draw]) for draw, name in streams.items() if name is not None}
        for grouped, name, mine in sorted(paired, key=lambda pair: (pair[1] == pair[2], pair)):
            beside = [(a, b) for kind, a, b in paired if kind == grouped and (a == name) != (b == mine)]
            if beside or (name and mine and name != mine):
                raise CordError(
                    f"replay={source}: responses of the stream {name or 'without a name'} would be trained on as those "
                    f"of {mine or 'the one without a name'}; replay with the streams, and their numbers of responses, "
                    "of the recorded run"
                )

    @property
    def given_fields(self) -> tuple[str, ...]:
        """The fields of samples that are responses."""
        return tuple(dict.fromkeys(term.source for term in self.terms if not term.sampled))

    def groups(self, policy_rollouts: int) -> dict[str, range]:
        """Return the numbers of the responses in a prompt's groups, 1, 2, …, by stream of L_seq.

        Args:
            policy_rollouts: N of the stream without a name.
        """
        groups, first = {}, 1
        for term in self.policy_terms:
            groups[term.name] = range(first, first + (term.responses or policy_rollouts))
            first = groups[term.name].stop
        return groups

    def policy_term_of(self, draw: int) -> PolicyStream:
        """Return the stream of L_seq of a response, by its number."""
        owners = [term for term in self.policy_terms for _ in range(term.responses or 0)]
        return owners[draw - 1] if owners else PolicyStream("", self.student_view)

    def stream_of(self, rollout: ScoredRollout) -> str:
        """Return the name of a rollout's stream; "" for one without a name."""
        return self._stream_of_draw(rollout.draw)

    def within(self, stream: str) -> ObjectiveConfig:
        """Return the objective with what a stream has of its own; the very same for ""."""
        if not stream:
            return self
        policy = self.policy_gradient
        if self.streams[stream].kind == "policy_gradient":
            weight = policy.weight * self.streams[stream].weight
            return replace(self, streams={}, policy_gradient=replace(policy, weight=weight))
        term = self._resolved(stream, self.streams[stream])
        return replace(self, streams={}, divergence=term.divergence, token_weights=term.token_weights)

    @property
    def views(self) -> tuple[str, ...]:
        """The views whose prompts go through the model or an engine."""
        policy = (term.student for term in self.policy_terms)
        return tuple(dict.fromkeys((*policy, *(view for term in self.terms for view in term.views))))

    def compares(self, terms: TermWeights) -> bool:
        """Return whether the reward of any stream of L_seq compares with the teacher's answers.

        Args:
            terms: the weights of streams that have none of their own.
        """
        return any((term.reward or terms).agreement for term in self.policy_terms)

    def verifies(self, terms: TermWeights) -> bool:
        """Return whether the reward of any stream of L_seq has the term reasoning; ``terms`` as for `compares`."""
        return any((term.reward or terms).reasoning for term in self.policy_terms)

    @property
    def distils(self) -> bool:
        """Whether a teacher's distributions are compared."""
        return any(term.distils for term in self.terms)

    def _stream_of_draw(self, draw: int) -> str:
        if not self.streams:
            return ""
        return (self.policy_term_of if draw > 0 else self.term_of)(draw).name

    def _named(self, kind: str) -> dict[str, StreamConfig]:
        """Return the streams of a kind by name."""
        return {name: each for name, each in self.streams.items() if each.kind == kind}

    def _resolved(self, name: str, given: StreamConfig) -> Stream:
        student = self.student_view if given.student is None else given.student
        return Stream(
            name,
            student if given.rollout is None else given.rollout,
            student,
            self.teacher_view if given.teacher is None else given.teacher,
            given.weight,
            given.responses,
            self.divergence if given.divergence is None else given.divergence,
            self.token_weights if given.token_weights is None else given.token_weights,
            given.contrast,
            given.taught_by,
            given.source,
            given.controller,
        )

    def _check_streams(self) -> None:
        for name in self.streams:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
                raise CordError(f"objective.streams: the name {name!r} has others than letters, digits, '_' and '-'")
        if self.responses == "teacher":
            raise CordError("objective.streams need objective.responses=student: they are of the student's responses")
        for term in self.terms:
            if term.name:
                term.check()
        if (policy := self._named("policy_gradient")) and not self.policy_gradient.enabled:
            raise CordError(
                f"objective.streams.{min(policy)} is of the kind policy_gradient and "
                "objective.policy_gradient.enabled is false: set it to true, or leave the stream out"
            )

    @property
    def policy_normalization(self) -> Literal["response", "response_mean", "token", "max_length"]:
        """What L_seq is divided by."""
        own = self.policy_gradient.normalization
        return self.normalization if own == "objective" else own

    def filters(self, rollout: ScoredRollout) -> bool:
        """Return whether a response of a group is left out of L_seq because it was cut."""
        return self.policy_gradient.filter_truncated and rollout.in_group and rollout.rollout.finish_reason == "length"


@dataclass(frozen=True)
class GlobalCounts:
    """What the sums are divided by, over all data-parallel ranks and microbatches of an update; at least 1."""

    scored: int  #: responses of L_tok, or their tokens, depending on the objective's normalization
    #: the same of L_seq; responses of zero-variance groups are counted, of those that were cut only the number
    policy: int

    @classmethod
    def of(cls, config: ObjectiveConfig, rollouts: Sequence[ScoredRollout], max_new_tokens: int) -> GlobalCounts:
        """Return those of an update on these rollouts, over all data-parallel ranks.

        Args:
            config: the objective.
            rollouts: all of the update's.
            max_new_tokens: the longest possible response.
        """
        scored = [len(r.rollout.token_ids) for r in rollouts if r.distilled]
        groups = [r for r in rollouts if r.in_group]
        kept = [len(r.rollout.token_ids) for r in groups if not config.filters(r)]
        policy = {"token": sum(kept), "max_length": len(groups) * max_new_tokens}
        return cls(
            max(1, sum(scored) if config.normalization == "token" else len(scored)),
            max(1, policy.get(config.policy_normalization, len(groups))),
        )
