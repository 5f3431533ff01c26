"""Which streams are aligned with which, and what cannot be meant."""

from __future__ import annotations

from megatron_cord.errors import CordError
from megatron_cord.reward import RewardConfig
from megatron_cord.trainer.step.objective import ObjectiveConfig


def check_alignment(objective: ObjectiveConfig, reward: RewardConfig) -> None:
    """Refuse alignment without a stream to align with, and the other way round.

    Raises:
        CordError: the first thing that does not fit.
    """
    policy = {term.name: term for term in objective.policy_terms}
    for name, term in policy.items():
        key = f"objective.streams.{name}"
        weights = term.reward or reward.terms
        terms = [which for which in ("layers", "embedding") if getattr(weights, which)]
        if not name and terms:
            raise CordError(
                f"reward.terms.{terms[0]} compares the responses of two streams; give objective.streams of the kind "
                "policy_gradient, one of them with align_with"
            )
        if terms and term.align_with is None:
            raise CordError(
                f"{key}: the reward has {terms[0]}, which compares with another stream's responses; name that stream "
                f"in {key}.align_with, or give this one a reward of its own without it"
            )
        if term.align_with is None:
            continue
        if not terms:
            raise CordError(f"{key}.align_with is set, and its reward has neither layers nor embedding; leave it out")
        other = policy.get(term.align_with)
        if other is None or other.align_with is not None:
            fit = ", ".join(each.name for each in policy.values() if each.align_with is None) or "none here"
            raise CordError(
                f"{key}.align_with={term.align_with} must be a stream of the kind policy_gradient that is not aligned "
                f"itself: {fit}"
            )
        theirs = other.reward or reward.terms
        if not (theirs.gold or theirs.agreement):
            raise CordError(
                f"{key}.align_with={term.align_with}: that stream's reward has neither gold nor agreement, which say "
                "which of its responses are right"
            )
        if weights.embedding and not reward.embedding.is_given:
            raise CordError(
                f"{key}: the reward has embedding; name the model in reward.embedding.checkpoint or .base_url"
            )
