"""The metrics of a step: what the train step measured, and what its rollouts tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_cord.rollout.schedule import staleness
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.logprob_mismatch import importance_metrics, mismatch_metrics
from megatron_cord.trainer.rollout_metrics import rollout_metrics
from megatron_cord.trainer.step.step import StepResult


def step_metrics(config: RunConfig, result: StepResult, version: int, times: Mapping[str, float]) -> dict[str, Any]:
    """Return a step's metrics by name.

    Args:
        config: of the run.
        result: of the step.
        version: of the weights that it began with.
        times: seconds of its rollout.
    """
    rollouts, objective = result.rollouts, config.objective
    metrics: dict[str, Any] = result.metrics | rollout_metrics(rollouts, config.rollout, objective)
    metrics |= times
    clip_norm, norm = config.optimizer.clip_norm, metrics["grad_norm"]
    if clip_norm:
        metrics["gradient_clipped"] = norm if math.isnan(norm) else float(norm > clip_norm)
    if objective.responses == "student":  # the teacher's responses come from another prompt
        cap = objective.policy_gradient.importance_cap
        same = [r for r in rollouts if r.in_group or objective.term_of(r.draw).on_policy]
        metrics |= mismatch_metrics(same, version) | importance_metrics(rollouts, cap)
    if config.replay is None:
        own = [rollout for rollout in rollouts if not objective.is_given(rollout)]
        generated = own if objective.responses == "student" else []
        metrics |= staleness([r.rollout for r in generated], version, None)
    return metrics
