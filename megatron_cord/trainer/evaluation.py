"""A training run's own evaluations: divergences from the teacher beside the answers, and the run's summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_cord.evaluation.answers import AudioResponse, Measured
from megatron_cord.evaluation.statistics import gap_closed
from megatron_cord.rollout.types import ScoredRollout, TokenResults
from megatron_cord.trainer.observability.logprob_mismatch import mismatch_metrics
from megatron_cord.trainer.observability.metrics import json_floats
from megatron_cord.trainer.step.batches import TrainingSequence

Scorer = Callable[[list[TrainingSequence]], dict[int, TokenResults]]


def measure_divergence(score: Scorer, version: int, responses: Sequence[AudioResponse]) -> Measured:
    """Score responses with student and teacher as a training step does. Collective.

    Args:
        score: `TrainStep.score`, of sequences that all ranks pass.
        version: of the trainer's weights.
        responses: from the audio prompts.

    Returns:
        each response's divergence by token, and how far trainer and engine differ on them (`mismatch_metrics`), as far
        as finite.
    """
    rollouts = [ScoredRollout(response.rollout, "distill") for response in responses]
    results = score(
        [
            TrainingSequence(response.audio_prompt, response.text_prompt, rollouts[i], i)
            for i, response in enumerate(responses)
        ]
    )
    metrics = mismatch_metrics([replace(r, tokens=results.get(i)) for i, r in enumerate(rollouts)], version)
    by_index = {i: None if tokens.kl is None else json_floats(tokens.kl) for i, tokens in results.items()}
    return Measured(
        [by_index.get(i) for i in range(len(responses))],
        {name: value for name, value in metrics.items() if math.isfinite(value)},
    )


def summarize(
    before: Mapping[str, Any], after: Mapping[str, Any], *, seconds: float, tp: int, steps: int, begun: int = 0
) -> dict[str, Any]:
    """Return the run's summary from its first and last evaluation; gaps are to the first one's text accuracy.

    Args:
        before: of the weights that the run began with.
        after: of its last step.
        seconds: spent in training.
        tp: of its layout.
        steps: of the whole training.
        begun: the step after which the run began, where it continues another's.
    """
    text = before["text_accuracy"]
    gap_before, gap_after = text - before["audio_accuracy"], text - after["audio_accuracy"]
    return {
        "text_accuracy": text,
        "text_accuracy_after": after["text_accuracy"],
        "audio_accuracy_before": before["audio_accuracy"],
        "audio_accuracy_after": after["audio_accuracy"],
        "gap_before": gap_before,
        "gap_after": gap_after,
        "gap_closed": gap_closed(text, before["audio_accuracy"], after["audio_accuracy"]),
        "samples": after["samples"],
        "seconds": seconds,
        "tp": tp,
        "steps": steps,
        "begun_after_step": begun,
    }
