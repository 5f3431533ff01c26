"""A training run's own evaluations: divergences from the teacher beside the answers, and the run's summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_cord.evaluation.answers import AudioResponse, Measured
from megatron_cord.evaluation.statistics import gap_closed
from megatron_cord.trainer.observability.logprob_mismatch import agreement_metrics
from megatron_cord.trainer.observability.metrics import json_floats
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.step import TokenRecord

Scorer = Callable[[list[TrainingSequence]], list[TokenRecord]]


def measure_divergence(score: Scorer, version: int, responses: Sequence[AudioResponse]) -> Measured:
    """Score responses with student and teacher as a training step does. Collective.

    Args:
        score: `TrainStep.score`.
        version: of the trainer's weights.
        responses: from the audio prompts.

    Returns:
        each response's divergence by token, and how far trainer and engine differ on them (`agreement_metrics`), as far
        as finite.
    """
    records = score(
        [TrainingSequence(r.audio_prompt, r.text_prompt, r.rollout, True, 0.0, i) for i, r in enumerate(responses)]
    )
    metrics = agreement_metrics(records, [response.rollout for response in responses], version)
    by_index = {record.index: None if record.kl is None else json_floats(record.kl) for record in records}
    return Measured(
        [by_index.get(i) for i in range(len(responses))],
        {name: value for name, value in metrics.items() if math.isfinite(value)},
    )


def summarize(
    before: Mapping[str, Any], after: Mapping[str, Any], *, seconds: float, tp: int, steps: int
) -> dict[str, Any]:
    """Return the run's summary from its first and last evaluation; gaps are to the original model's text accuracy."""
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
    }
