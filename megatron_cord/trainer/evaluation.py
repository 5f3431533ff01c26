"""A training run's own evaluations: when they are due, divergences from the teacher beside the answers, the summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cord.evaluation.answers import AudioResponse, Measured
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_file, read_result, step_label
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.evaluation.statistics import gap_closed
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.rollout.types import RolloutEngine, ScoredRollout, TokenResults
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.observability.logprob_mismatch import mismatch_metrics
from megatron_cord.trainer.observability.metrics import MetricsLog, json_floats
from megatron_cord.trainer.step.batches import TrainingSequence

Scorer = Callable[[list[TrainingSequence]], dict[int, TokenResults]]


class Evaluations:
    """The evaluations of a training run. All ranks call its methods together.

    Args:
        evaluator: answers and scores the run's question sets.
        log: is told the accuracies.
        directory: of the run.
        interval: steps between evaluations; 0: none but the first and the last.
        steps: of the whole training.
        begun: the step after which the run began, where it continues another's.
        tp: of its layout.
        writes: whether this rank writes the summary.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        log: MetricsLog,
        directory: Path,
        *,
        interval: int,
        steps: int,
        begun: int,
        tp: int,
        writes: bool,
    ) -> None:
        self._evaluator, self._log, self._directory = evaluator, log, directory
        self._interval, self._steps, self._begun, self._tp, self._writes = interval, steps, begun, tp, writes

    def is_due(self, step: int) -> bool:
        """Return whether the weights after a step are to be evaluated."""
        return step == self._steps or bool(self._interval and step % self._interval == 0)

    def is_missing(self, step: int) -> bool:
        """Return whether an evaluation was due after a step, and its result is not there."""
        return self.is_due(step) and not broadcast_json(heldout_file(self._directory, step).is_file())

    def answer(self, engine: RolloutEngine, score: Scorer, step: int) -> dict[str, float]:
        """Answer all questions with the engine's weights, those after a step; return the scalars measured.

        Args:
            engine: generates, collectively.
            score: computes token results of sequences that all ranks pass.
            step: made so far.
        """
        return self._evaluator.answer_anew(engine, partial(measure_divergence, score, step))

    def write(self, step: int, seconds: float) -> None:
        """Score and write the answers; after the last step also the summary.

        Args:
            step: made so far.
            seconds: spent in training so far.
        """
        results = self._evaluator.score(step_label(step), step)
        result = results.pop(HELDOUT)
        self._log.evaluation({"step": step} | result)
        for name, other in results.items():
            self._log.question_set(step, name, other)
        before = heldout_file(self._directory, self._begun)
        if self._writes and step == self._steps and before.is_file():
            summary = summarize(
                read_result(before), result, seconds=round(seconds, 1), tp=self._tp, steps=step, begun=self._begun
            )
            write_json(self._directory / "summary.json", summary)


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
