"""Trainer against engine on the same tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults, VersionSpan
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch, importance_metrics, mismatch_metrics
from tests.tiny_run import make_run, metrics, overrides, write_inputs

ENGINE = (-1.0, -2.0, -0.5, -3.0)
TRAINER = [-1.5, -1.9, -0.1, -1.0]
ROLLOUT = Rollout("s", (1, 2, 3, 4), ENGINE, "stop", (VersionSpan(0, 1, 3), VersionSpan(1, 4, 4)), "")
TRAINED = ScoredRollout(ROLLOUT, "policy", advantage=-0.5, tokens=TokenResults(None, None, TRAINER))
ROLLOUTS = [ScoredRollout(ROLLOUT, "policy"), TRAINED]  # the first was not trained on, and is left out


def test_only_tokens_of_these_weights_count() -> None:
    """Catches staleness that is taken for disagreement, a wrong estimator of the divergence.

    Also a difference with its sign.
    """
    found = mismatch_metrics(ROLLOUTS, 4)
    fresh = [0.1, 0.4, 2.0]
    assert found["stale_tokens"] == 0.25 and found["stale_logprob_difference"] == pytest.approx(0.5)
    assert (
        found["engine_logprob_difference"] == pytest.approx(sum(fresh) / 3)
        and found["engine_logprob_difference_max"] == 2.0
    )
    assert found["engine_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in fresh) / 3)
    assert mismatch_metrics(ROLLOUTS, 5).keys() == {"stale_tokens", "stale_logprob_difference"}


def test_importance_weights_are_reported() -> None:
    """Catches weights of the wrong ratio, and truncation that nobody sees."""
    found = importance_metrics(ROLLOUTS, 2.0)
    ratios = [math.exp(p - q) for p, q in zip(TRAINER, ENGINE, strict=True)]
    assert found == {
        "importance_weight": pytest.approx(sum(min(r, 2.0) for r in ratios) / 4),
        "importance_truncated": 0.25,
    }
    assert importance_metrics([replace(TRAINED, advantage=0.0)], 2.0) == {}


def test_the_limit_stops_the_run() -> None:
    """Catches an engine with other weights that trains on, and a limit that stale or unmeasured tokens trip."""
    found = mismatch_metrics(ROLLOUTS, 4)
    with pytest.raises(
        CordError,
        match=r"step 5: trainer and engine differ by 0.833 nats .*max_logprob_mismatch is 0.25. Likely causes",
    ):
        check_mismatch(found, 0.25, "step 5")
    check_mismatch(found, 0.9, "step 5")
    check_mismatch(found, None, "step 5")
    check_mismatch(mismatch_metrics(ROLLOUTS, 5), 0.25, "step 5")


def test_the_local_engine_has_the_models_precision(tmp_path: Path) -> None:
    """Catches an engine in the precision of the checkpoint's files: other log-probs, and slow where it is emulated."""
    inputs = write_inputs(tmp_path)
    weights = inputs / "checkpoint" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    config = inputs / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    settings = ("train.steps=1", "checkpoint.interval=0", "model.dtype=float32")
    assert make_run(overrides(inputs, tmp_path / "run", *settings)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["engine_logprob_difference_max"] < 1e-5
