"""Streams: terms of the objective, each with responses, views and a weight of its own.

    L = Σ_k λ_k L_tok,k + Σ_m λ_m L_seq,m

A stream of distillation draws responses to one view, and compares student and teacher on them, each on a view of its
own. A stream of the policy gradient draws groups of responses to one view and rewards them. All streams are trained on
in one step: their microbatches accumulate into one gradient. A term's denominator counts its own responses (or tokens),
so λ does not depend on how many responses another stream has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, TokenWeightsConfig
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.trainer.step.controller import ControllerConfig

#: Keys that a stream of the policy gradient cannot have
_OF_DISTILLATION = (
    "teacher",
    "taught_by",
    "contrast",
    "rollout",
    "source",
    "divergence",
    "token_weights",
    "controller",
)


@dataclass(frozen=True)
class ContrastConfig:
    """A second view of the teacher: log q ∝ log p_A + alpha (log p_A − log p_B), A its own view and B this one."""

    view: str  #: which view (views) the teacher's distribution is moved away from, such as one without the recording
    alpha: float = 1.0  #: how far
    #: a response's token counts only where log p_A and log p_B of it differ by more than this, nats; null: all count
    gate: float | None = None

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise CordError(f"alpha is {self.alpha:g}; give a number above 0, or leave the contrast out")
        if self.gate is not None and not (self.gate >= 0 and math.isfinite(self.gate)):
            raise CordError(f"gate is {self.gate:g}; give nats of at least 0, or null for no gate")


@dataclass(frozen=True)
class StreamConfig:
    """A term of the objective under a name: streams: {NAME: {student: read, teacher: read, weight: 0.5}}."""

    #: distillation is a term of L_tok; policy_gradient one of L_seq, with groups of responses to student and rewards
    kind: Literal["distillation", "policy_gradient"] = "distillation"
    student: str | None = None  #: which view the student is trained on; null: objective.student_view
    teacher: str | None = None  #: which view the teacher scores on; null: objective.teacher_view
    #: which of the teachers scores, by its name under teachers; null: the sample's set's, or the run's own
    taught_by: str | None = None
    contrast: ContrastConfig | None = None  #: a view that the teacher's distribution is contrasted with; null: none
    rollout: str | None = None  #: which view the responses answer; null: that of student
    weight: float = 1.0  #: λ; of policy_gradient beside objective.policy_gradient.weight
    #: responses to each of a step's prompts; of policy_gradient N of a group, in place of rollout.policy_rollouts
    responses: int = 1
    #: whose responses: student, sampled from it; or answer or solution, that text of the sample as it is
    source: Literal["student", "answer", "solution"] = "student"
    divergence: DivergenceConfig | None = None  #: D_t; null: objective.divergence
    token_weights: TokenWeightsConfig | None = None  #: w_t; null: objective.token_weights
    controller: ControllerConfig | None = None  #: multiplies the weight by a factor that follows the student; null: 1
    reward: TermWeights | None = None  #: of policy_gradient: what its reward is made of; null: reward.terms
    #: of policy_gradient: the stream whose right responses the terms layers and embedding of its reward compare with
    align_with: str | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise CordError(f"weight is {self.weight:g}; give a number above 0, or leave the stream out")
        if self.responses < 1:
            raise CordError(f"responses is {self.responses}; a stream has at least 1, or is left out")
        if self.source != "student" and (self.responses > 1 or self.rollout is not None):
            raise CordError(f"source is {self.source}, of which a sample has one; leave responses and rollout out")
        if self.kind == "distillation":
            for key in ("reward", "align_with"):
                if getattr(self, key) is not None:
                    raise CordError(f"{key} is of a stream of the kind policy_gradient; a distillation has no reward")
            return
        given = [key for key in _OF_DISTILLATION if getattr(self, key) not in (None, "student")]
        if given:
            raise CordError(f"{given[0]} is of a distillation; leave it out of a stream of the kind policy_gradient")
        if self.responses < 2:
            raise CordError(
                f"responses is {self.responses}; a stream of the kind policy_gradient compares the responses of a "
                "group: give at least 2"
            )


@dataclass(frozen=True)
class Stream:
    """A stream whose settings are all known.

    Attributes:
        name: of the stream; "" for the only one, which has no name.
        rollout: the view whose prompts the responses answer.
        student: the view that the student is trained on.
        teacher: the view that the teacher scores on.
        weight: λ.
        responses: to each of a step's prompts.
        divergence: D_t.
        token_weights: w_t.
        contrast: the teacher's second view; None without one.
        taught_by: the teacher's name; None: the teacher of the sample's set.
        source: "student", or the field of the sample that is the response.
        controller: of the weight; None for a constant one.
    """

    name: str
    rollout: str
    student: str
    teacher: str
    weight: float
    responses: int
    divergence: DivergenceConfig
    token_weights: TokenWeightsConfig
    contrast: ContrastConfig | None = None
    taught_by: str | None = None
    source: Literal["student", "answer", "solution"] = "student"
    controller: ControllerConfig | None = None

    @property
    def sampled(self) -> bool:
        """Whether the engine makes its responses."""
        return self.source == "student"

    @property
    def distils(self) -> bool:
        """Whether a teacher's distributions are compared."""
        return self.divergence.needs_teacher

    @property
    def on_policy(self) -> bool:
        """Whether the student is trained on the prompt that its own responses answer."""
        return self.sampled and self.rollout == self.student

    @property
    def taught_views(self) -> tuple[str, ...]:
        """The views that the teacher scores on; none where no teacher is compared."""
        if not self.distils:
            return ()
        return (self.teacher,) if self.contrast is None else (self.teacher, self.contrast.view)

    @property
    def views(self) -> tuple[str, ...]:
        """The views whose prompts it needs."""
        return (self.rollout, self.student, *self.taught_views)

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            CordError: no divergence, a contrast of which nothing is left, or what needs the tokens' probabilities, of
                tokens that were sampled from another prompt or by another model.
        """
        key = f"objective.streams.{self.name}"
        if self.divergence.kind == "none":
            raise CordError(f"{key} has the divergence none: nothing of it would be trained; leave the stream out")
        if self.contrast is not None and not self.distils:
            raise CordError(f"{key}.contrast needs a teacher, which divergence.kind={self.divergence.kind} has not")
        if self.contrast is not None and self.contrast.view == self.teacher:
            raise CordError(
                f"{key}.contrast.view={self.teacher} is the view that the teacher scores on: nothing would be "
                "contrasted; name another one"
            )
        if self.divergence.kind == "sampled" and not self.sampled:
            raise CordError(
                f"{key}.source={self.source} is not the student's: divergence.kind=sampled is a policy gradient of its "
                "own responses"
            )
        if self.token_weights.needs_ratio and not (self.sampled and self.on_policy):
            raise CordError(
                f"{key}: the token weights importance need the student's own responses to the view that it is trained "
                f"on ({self.student}); choose this view and source, or other weights"
            )
        if self.divergence.kind == "sampled" and not self.on_policy:
            raise CordError(
                f"{key} samples from the view {self.rollout} and trains on {self.student}: divergence.kind=sampled is "
                "a policy gradient, which needs responses to the prompt that is trained on; choose one view"
            )
        if self.controller is not None and not self.distils:
            raise CordError(
                f"{key} has a controller, which measures how far the student lags behind a teacher, and the divergence "
                f"{self.divergence.kind}, which has none; leave controller out"
            )


@dataclass(frozen=True)
class PolicyStream:
    """A stream of the policy gradient.

    Attributes:
        name: of the stream; "" for the one that objective.policy_gradient describes.
        student: the view that the responses answer and the student is trained on.
        weight: λ.
        responses: N of a group; None: rollout.policy_rollouts.
        reward: the weights of its reward's terms; None: reward.terms.
        align_with: the stream whose right responses it is compared with; None for none.
    """

    name: str
    student: str
    weight: float = 1.0
    responses: int | None = None
    reward: TermWeights | None = None
    align_with: str | None = None
