"""What a step's rollouts say before any training: how they end, repeat themselves, and are rewarded."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.types import ScoredRollout
from megatron_cord.trainer.step.objective import ObjectiveConfig


def repetition(token_ids: Sequence[int], size: int = 4) -> float:
    """Return the share of n-grams that occur earlier in the response: near 1 for a loop, 0 for a short one."""
    grams = [tuple(token_ids[i : i + size]) for i in range(len(token_ids) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > size else 0.0


def rollout_metrics(
    rollouts: Sequence[ScoredRollout], config: RolloutConfig, objective: ObjectiveConfig
) -> dict[str, float]:
    """Summarize how responses end and repeat themselves; with L_seq also rewards, groups, and the judge's share.

    The reward is that of all groups, replaced ones included: the policy's, not that of a selection.

    Args:
        rollouts: of the step on all ranks; texts of the samples that stand for responses are left out.
        config: how many responses a group has, and whether groups are replaced.
        objective: whether responses are filtered.
    """
    rollouts = [rollout for rollout in rollouts if not objective.is_given(rollout)]
    metrics = {
        "truncated": sum(r.rollout.finish_reason == "length" for r in rollouts) / max(len(rollouts), 1),
        "repetition": sum(repetition(r.rollout.token_ids) for r in rollouts) / max(len(rollouts), 1),
    }
    rewarded = [r for r in rollouts if r.reward is not None]
    if not rewarded:
        return metrics
    metrics |= {
        "reward": sum(r.reward for r in rewarded if r.reward is not None) / len(rewarded),
        "groups": sum(r.in_group for r in rewarded) / config.policy_rollouts,
        "zero_variance_groups": sum(r.in_group and r.zero_variance for r in rewarded) / config.policy_rollouts,
    }
    if config.dynamic_sampling:
        metrics["replaced_groups"] = sum(not r.in_group for r in rewarded) / config.policy_rollouts
    if objective.policy_gradient.filter_truncated:
        kept = [r for r in rewarded if r.in_group]
        metrics["filtered"] = sum(objective.filters(r) for r in kept) / max(len(kept), 1)
    scores = [r.score for r in rewarded if r.score is not None]
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
