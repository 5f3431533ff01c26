"""Tags of metrics: a group, and the name in metrics.jsonl."""

from __future__ import annotations

import pytest

from megatron_cord.trainer.observability.trackers.tags import tag


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "loss"),
        ("loss_sequence", "loss"),
        ("kl", "loss"),
        ("entropy", "loss"),
        ("reward_match", "rollout"),
        ("zero_variance_groups", "rollout"),
        ("engine_logprob_difference_max", "rollout"),
        ("staleness", "rollout"),
        ("judge_fallbacks", "rollout"),
        ("learning_rate_adapter", "optimizer"),
        ("grad_norm", "optimizer"),
        ("gradient_clipped", "optimizer"),
        ("seconds", "time"),
        ("seconds_wait_rollouts", "time"),
        ("seconds_forward_backward", "time"),
        ("tokens_per_second", "speed"),
        ("tokens_per_second_teacher", "speed"),
        ("model_flop_utilisation", "speed"),
        ("tokens_student", "tokens"),
        ("response_tokens", "rollout"),
        ("memory_peak_gb", "memory"),
        ("ratio_max", "loss"),
        ("clipped_low", "loss"),
        ("updates", "optimizer"),
        ("replaced_groups", "rollout"),
        ("damaged_samples", "data"),
        ("alerts", "run"),
        ("of_another_version", "other"),
    ],
)
def test_each_metric_has_its_group(name: str, group: str) -> None:
    """Catches a metric in a wrong group, or whose name is not that of metrics.jsonl."""
    assert tag(name) == f"{group}/{name}"
    assert tag(tag(name)) == tag(name) or group == "other"
