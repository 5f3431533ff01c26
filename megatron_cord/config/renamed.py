"""Configuration keys that were renamed: a file that has an old one is refused with the new one."""

from __future__ import annotations

#: Old dotted key → new dotted key. A key that went without a successor has the sentence that says what to do instead.
RENAMED: dict[str, str] = {
    "rollout.exchange": "rollout.weight_sync",
    "rollout.exchange.way": "rollout.weight_sync.transport",
    "rollout.on_exchange": "rollout.schedule.on_weight_sync",
    "rollout.on_weight_sync": "rollout.schedule.on_weight_sync",
    "rollout.schedule": "rollout.schedule.ahead",
    "rollout.max_staleness": "rollout.schedule.ahead",
    "rollout.colocated": "rollout.schedule.colocated",
    "rollout.servers": "rollout.sglang.servers",
    "rollout.servers_file": "rollout.sglang.servers_file",
    "rollout.min_servers": "rollout.sglang.min_servers",
    "rollout.api_key_file": "rollout.sglang.api_key_file",
    "rollout.agreement_limit": "rollout.max_logprob_mismatch",
    "exchange": "weight_sync",
    "exchange.way": "weight_sync.transport",
    "ways": "transports",
    # Scalars that became sections: the old key as a scalar is the section's main key.
    "objective.divergence": "objective.divergence.kind",
    "objective.token_weights": "objective.token_weights.factors",
    "objective.policy_gradient": "objective.policy_gradient.enabled",
    "objective.jsd_beta": "objective.divergence.beta",
    "objective.vocabulary_top_k": "objective.divergence.k",
    "objective.top_k": "objective.token_weights.top_k",
    "objective.alpha": "objective.token_weights.alpha",
    "objective.beta": "objective.token_weights.beta",
    "objective.keep": "objective.token_weights.keep",
    "objective.gamma": "objective.token_weights.gamma",
    "objective.policy_weight": "objective.policy_gradient.weight",
    "objective.importance_cap": "objective.policy_gradient.importance_cap",
    "objective.normalize_std": "objective.policy_gradient.normalize_std",
    "alerts.silent_groups": "alerts.zero_variance_groups",
    "alerts.agreement_growth": "alerts.logprob_mismatch_growth",
    "alerts.agreement_floor": "alerts.logprob_mismatch_floor",
}
