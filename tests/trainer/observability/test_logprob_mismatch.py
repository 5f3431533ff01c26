"""Trainer against engine on the same tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults, VersionSpan
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch, importance_metrics, mismatch_metrics

ENGINE = (-1.0, -2.0, -0.5, -3.0)
TRAINER = [-1.5, -1.9, -0.1, -1.0]
ROLLOUT = Rollout("s", (1, 2, 3, 4), ENGINE, "stop", (VersionSpan(0, 1, 3), VersionSpan(1, 4, 4)), "")
TRAINED = ScoredRollout(ROLLOUT, "policy", advantage=-0.5, tokens=TokenResults(None, None, TRAINER))
ROLLOUTS = [ScoredRollout(ROLLOUT, "policy"), TRAINED]  # the first was not trained on, and is left out


def test_only_tokens_of_these_weights_count() -> None:
    """Catches staleness that is taken for disagreement, a wrong estimator of the divergence.

    Also a difference with its sign.
    """
    metrics = mismatch_metrics(ROLLOUTS, 4)
    fresh = [0.1, 0.4, 2.0]
    assert metrics["stale_tokens"] == 0.25 and metrics["stale_logprob_difference"] == pytest.approx(0.5)
    assert (
        metrics["engine_logprob_difference"] == pytest.approx(sum(fresh) / 3)
        and metrics["engine_logprob_difference_max"] == 2.0
    )
    assert metrics["engine_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in fresh) / 3)
    assert mismatch_metrics(ROLLOUTS, 5).keys() == {"stale_tokens", "stale_logprob_difference"}


def test_importance_weights_are_reported() -> None:
    """Catches weights of the wrong ratio, and truncation that nobody sees."""
    metrics = importance_metrics(ROLLOUTS, 2.0)
    ratios = [math.exp(p - q) for p, q in zip(TRAINER, ENGINE, strict=True)]
    assert metrics == {
        "importance_weight": pytest.approx(sum(min(r, 2.0) for r in ratios) / 4),
        "importance_truncated": 0.25,
    }
    assert importance_metrics([replace(TRAINED, advantage=0.0)], 2.0) == {}


def test_the_limit_stops_the_run() -> None:
    """Catches an engine with other weights that trains on, and a limit that stale or unmeasured tokens trip."""
    metrics = mismatch_metrics(ROLLOUTS, 4)
    with pytest.raises(
        CordError,
        match=r"step 5: trainer and engine differ by 0.833 nats .*max_logprob_mismatch is 0.25. Likely causes",
    ):
        check_mismatch(metrics, 0.25, "step 5")
    check_mismatch(metrics, 0.9, "step 5")
    check_mismatch(metrics, None, "step 5")
    check_mismatch(mismatch_metrics(ROLLOUTS, 5), 0.25, "step 5")
