"""Trainer against engine on the same tokens."""

from __future__ import annotations

import math

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, VersionSpan
from megatron_cord.trainer.observability.logprob_mismatch import agreement_metrics, check_agreement, importance_metrics
from megatron_cord.trainer.step.step import TokenRecord

ENGINE = (-1.0, -2.0, -0.5, -3.0)
TRAINER = [-1.5, -1.9, -0.1, -1.0]
ROLLOUTS = [Rollout("s", (1, 2, 3, 4), ENGINE, "stop", (VersionSpan(0, 1, 3), VersionSpan(1, 4, 4)), "")]
RECORDS = [TokenRecord(0, None, None, TRAINER)]


def test_only_tokens_of_these_weights_count() -> None:
    """Catches staleness that is taken for disagreement, a wrong estimator of the divergence, and a difference with its sign."""
    metrics = agreement_metrics(RECORDS, ROLLOUTS, 4)
    fresh = [0.1, 0.4, 2.0]
    assert metrics["stale_tokens"] == 0.25 and metrics["stale_logprob_difference"] == pytest.approx(0.5)
    assert (
        metrics["engine_logprob_difference"] == pytest.approx(sum(fresh) / 3)
        and metrics["engine_logprob_difference_max"] == 2.0
    )
    assert metrics["engine_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in fresh) / 3)
    assert agreement_metrics(RECORDS, ROLLOUTS, 5).keys() == {"stale_tokens", "stale_logprob_difference"}


def test_importance_weights_are_reported() -> None:
    """Catches weights of the wrong ratio, and truncation that nobody sees."""
    metrics = importance_metrics(RECORDS, ROLLOUTS, [True], 2.0)
    ratios = [math.exp(p - q) for p, q in zip(TRAINER, ENGINE, strict=True)]
    assert metrics == {
        "importance_weight": pytest.approx(sum(min(r, 2.0) for r in ratios) / 4),
        "importance_truncated": 0.25,
    }
    assert importance_metrics(RECORDS, ROLLOUTS, [False], 2.0) == {}


def test_the_limit_stops_the_run() -> None:
    """Catches an engine with other weights that trains on, and a limit that stale or unmeasured tokens trip."""
    metrics = agreement_metrics(RECORDS, ROLLOUTS, 4)
    with pytest.raises(
        CordError, match=r"step 5: trainer and engine differ by 0.833 nats .*agreement_limit is 0.25. Likely causes"
    ):
        check_agreement(metrics, 0.25, "step 5")
    check_agreement(metrics, 0.9, "step 5")
    check_agreement(metrics, None, "step 5")
    check_agreement(agreement_metrics(RECORDS, ROLLOUTS, 5), 0.25, "step 5")
