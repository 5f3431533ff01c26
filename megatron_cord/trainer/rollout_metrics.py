"""What a step's rollouts say before any training: how they end, repeat themselves, and are rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_cord.reward import Score
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
        "reward": _mean_reward(rewarded),
        "groups": _groups([r for r in rewarded if r.in_group], config, objective),
        "zero_variance_groups": _groups([r for r in rewarded if r.in_group and r.zero_variance], config, objective),
    }
    for name in (term.name for term in objective.policy_terms if term.name):
        metrics |= _stream_metrics(name, [r for r in rewarded if objective.stream_of(r) == name], config, objective)
    if config.dynamic_sampling:
        metrics["replaced_groups"] = _groups([r for r in rewarded if not r.in_group], config, objective)
    if objective.policy_gradient.filter_truncated:
        kept = [r for r in rewarded if r.in_group]
        metrics["filtered"] = sum(objective.filters(r) for r in kept) / max(len(kept), 1)
    scores = [r.score for r in rewarded if r.score is not None]
    metrics |= _term_metrics("reward_", scores)
    judged, fallbacks, verified = (sum(getattr(s, of) for s in scores) for of in ("judged", "fallbacks", "verified"))
    if judged + fallbacks + verified:
        metrics["judge_fallbacks"] = fallbacks / (judged + fallbacks + verified)
        if judged or not verified:
            metrics["judge_disagreement"] = sum(s.disagreements for s in scores) / max(judged, 1)
    return metrics


def _mean_reward(rollouts: Sequence[ScoredRollout]) -> float:
    return sum(r.reward for r in rollouts if r.reward is not None) / len(rollouts)


def _groups(rollouts: Sequence[ScoredRollout], config: RolloutConfig, objective: ObjectiveConfig) -> float:
    """Return how many groups these responses are."""
    sizes = {name: len(draws) for name, draws in objective.groups(config.policy_rollouts).items()}
    counts = Counter(objective.stream_of(r) for r in rollouts)
    return sum((count / sizes.get(name, config.policy_rollouts) for name, count in counts.items()), start=0.0)


def _term_metrics(prefix: str, scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean of each term over the responses that have it; of a single term nothing."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.terms.items():
            values.setdefault(name, []).append(value)
    return {f"{prefix}{name}": sum(of) / len(of) for name, of in values.items()} if len(values) > 1 else {}


def _stream_metrics(
    name: str, rollouts: Sequence[ScoredRollout], config: RolloutConfig, objective: ObjectiveConfig
) -> dict[str, float]:
    """Return reward, its terms and zero-variance groups of one stream of L_seq; nothing without responses."""
    if not rollouts:
        return {}
    equal = [r for r in rollouts if r.in_group and r.zero_variance]
    return {
        f"stream/{name}/reward": _mean_reward(rollouts),
        f"stream/{name}/zero_variance_groups": _groups(equal, config, objective),
        **_term_metrics(f"stream/{name}/reward_", [r.score for r in rollouts if r.score is not None]),
    }
