"""Distillation streams: terms of the objective, each with responses, views and a divergence of its own.

    L = Σ_k λ_k L_tok,k + L_seq

A stream k draws responses to one view, and compares student and teacher on them, each on a view of its own. All streams
are trained on in one step: their microbatches accumulate into one gradient. A term's denominator counts its own
responses (or tokens), so λ does not depend on how many responses another stream has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, TokenWeightsConfig


@dataclass(frozen=True)
class StreamConfig:
    """A term of L_tok under a name: streams: {NAME: {student: read, teacher: read, weight: 0.5}}."""

    student: str | None = None  #: which view the student is trained on; null: objective.student_view
    teacher: str | None = None  #: which view the teacher scores on; null: objective.teacher_view
    rollout: str | None = None  #: which view the responses answer; null: that of student
    weight: float = 1.0  #: λ
    responses: int = 1  #: responses to each of a step's prompts
    divergence: DivergenceConfig | None = None  #: D_t; null: objective.divergence
    token_weights: TokenWeightsConfig | None = None  #: w_t; null: objective.token_weights

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise CordError(f"weight is {self.weight:g}; give a number above 0, or leave the stream out")
        if self.responses < 1:
            raise CordError(f"responses is {self.responses}; a stream has at least 1, or is left out")


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
    """

    name: str
    rollout: str
    student: str
    teacher: str
    weight: float
    responses: int
    divergence: DivergenceConfig
    token_weights: TokenWeightsConfig

    @property
    def distils(self) -> bool:
        """Whether a teacher's distributions are compared."""
        return self.divergence.needs_teacher

    @property
    def on_policy(self) -> bool:
        """Whether the student is trained on the prompt that the responses answer."""
        return self.rollout == self.student

    @property
    def taught_views(self) -> tuple[str, ...]:
        """The views that the teacher scores on; none where no teacher is compared."""
        return (self.teacher,) if self.distils else ()

    @property
    def views(self) -> tuple[str, ...]:
        """The views whose prompts it needs."""
        return (self.rollout, self.student, *self.taught_views)

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            CordError: no divergence, or a policy gradient of tokens that were sampled from another prompt.
        """
        key = f"objective.streams.{self.name}"
        if self.divergence.kind == "none":
            raise CordError(f"{key} has the divergence none: nothing of it would be trained; leave the stream out")
        if self.divergence.kind == "sampled" and not self.on_policy:
            raise CordError(
                f"{key} samples from the view {self.rollout} and trains on {self.student}: divergence.kind=sampled is "
                "a policy gradient, which needs responses to the prompt that is trained on; choose one view"
            )
