"""A training run's own evaluations: when they are due, divergences from the teacher beside the answers, the summary."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.evaluation.answers import AudioResponse, Measured
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_file, heldout_files, read_result, step_label
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.evaluation.statistics import gap_closed
from megatron_cord.parallel.objects import broadcast_json, run_on_main
from megatron_cord.rollout.types import RolloutEngine, ScoredRollout, TokenResults
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.endings.best import Best, BestEvaluation, past_values, value_of
from megatron_cord.trainer.endings.guards import Guards
from megatron_cord.trainer.first_evaluation import find_first_evaluation
from megatron_cord.trainer.observability.logprob_mismatch import mismatch_metrics
from megatron_cord.trainer.observability.metrics import MetricsLog, json_floats
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.batching.batches import TrainingSequence

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
Scorer = Callable[[list[TrainingSequence]], dict[int, TokenResults]]


class Evaluations:
    """The evaluations of a training run. All ranks call its methods together.

    Args:
        config: of the run.
        evaluator: answers and scores the run's question sets.
        log: is told the accuracies.
        start: where the run begins.
        guards: of the run.
        checkpoint: fingerprint of the files that the run began with.
        writes: whether this rank writes the summary.

    Attributes:
        guards: the same.
    """

    def __init__(
        self,
        config: RunConfig,
        evaluator: Evaluator,
        log: MetricsLog,
        start: Start,
        guards: Guards,
        checkpoint: str,
        *,
        writes: bool,
    ) -> None:
        self.guards, self._checkpoint = guards, checkpoint
        self._config, self._evaluator, self._log, self._writes = config, evaluator, log, writes
        self._directory, self._begun = Path(config.output_dir), start.progress.made_with.begun
        last = -1 if start.begins else start.progress.step
        past = past_values(config.evaluation.early_stopping, self._directory, self._begun, last)
        made = [step for step in heldout_files(self._directory) if step <= last]
        self._first = run_on_main(lambda: _first(config)) if start.begins else None
        made, past_pairs = broadcast_json([made, list(past.items())])
        self._made = set(made)
        self._best = BestEvaluation(config.evaluation.early_stopping, dict(past_pairs))

    @property
    def best(self) -> Best | None:
        """The best evaluation after the run's beginning."""
        return self._best.best

    @property
    def end_the_run(self) -> bool:
        """Whether there was no better one for so long that the run ends."""
        return self._best.is_over

    def is_due(self, step: int) -> bool:
        """Return whether the weights after a step are to be evaluated."""
        interval = self._config.evaluation.interval
        return step == self._config.train.steps or bool(interval and step % interval == 0)

    def is_made(self, step: int) -> bool:
        """Return whether the weights after a step were evaluated."""
        return step in self._made

    def answer(self, engine: RolloutEngine, score: Scorer, step: int) -> dict[str, float]:
        """Answer all questions with the engine's weights, those after a step; return the scalars measured.

        Args:
            engine: generates, collectively.
            score: computes token results of sequences that all ranks pass.
            step: made so far.
        """
        if self._first is not None and step == self._begun:
            logger.info("step %d: the answers are those of %s, which began with the same model", step, self._first)
            self._evaluator.take(Path(self._first))
            return {}
        return self._evaluator.answer_anew(engine, partial(measure_divergence, score, step))

    def write(self, step: int) -> bool:
        """Score and write the answers to the questions after a step; return whether they are the best so far.

        Raises:
            CordError: the set of `evaluation.early_stopping` lacks the value that counts; or as `Guards.check`.
        """
        results = self._evaluator.score(step_label(step), step, self._checkpoint)
        self._made.add(step)
        counts = self._config.evaluation.early_stopping
        self._log.evaluation({"step": step} | results[HELDOUT])
        for name, other in results.items():
            if name != HELDOUT:
                self._log.question_set(step, name, other)
        for name, drop in self.guards.check(step).items():
            self._log.guard(step, name, drop, self.guards.warning(name, drop))
        value = value_of(counts, results[counts.set])  # one that is missing is named before the first step
        return step > self._begun and self._best.add(step, value)

    def withdraw_summary(self, step: int) -> None:
        """Remove the summary of a run that was finished and goes on after a step, until it is finished again.

        Where a guard had gone back to that step, evaluations behind it are set aside: they are of other weights.
        """
        if not self._writes:
            return
        if guard_ending(self._directory) is not None:
            for later in [path.parent for at, path in heldout_files(self._directory).items() if at > step]:
                aside = later.with_name(f"set_aside_{later.name}")
                shutil.rmtree(aside, ignore_errors=True)
                later.replace(aside)
        (self._directory / SUMMARY).unlink(missing_ok=True)

    def best_until(self, step: int) -> Best | None:
        """Return the best evaluation up to a step, which the run may have gone back to."""
        if self.best is None or self.best.step <= step:
            return self.best
        counts = self._config.evaluation.early_stopping
        return BestEvaluation(counts, past_values(counts, self._directory, self._begun, step)).best

    def finish(self, step: int, seconds: float, ended_by: str, guard: Mapping[str, Any] | None = None) -> None:
        """Write the run's summary.

        Args:
            step: the last one, or the one that the run went back to.
            seconds: spent in training.
            ended_by: what ended the run: "steps", "hours", "early_stopping" or "guard".
            guard: the record of the guard that did (`Guards.record`).
        """
        before, after = (heldout_file(self._directory, at) for at in (self._begun, step))
        if not self._writes or not before.is_file():
            return
        best = self.best_until(step)
        summary = summarize(
            read_result(before),
            read_result(after),
            seconds=round(seconds, 1),
            tp=self._config.parallel.tp,
            steps=step,
            begun=self._begun,
            ended_by=ended_by,
            best=None if best is None else asdict(best),
        )
        if self.guards:
            summary |= {"guards": self.guards.results(step), "guard": guard}
        write_json(self._directory / SUMMARY, summary)


def _first(config: RunConfig) -> str | None:
    """Return the directory of the evaluation that `evaluation.first_from` names; None for none."""
    run = config.evaluation.first_from
    return None if run is None else str(find_first_evaluation(config, Path(run)))


def guard_ending(run: Path) -> Mapping[str, Any] | None:
    """Return the record of the guard that ended a run, from its summary; None where none did."""
    try:
        summary = read_result(run / SUMMARY)
    except CordError:  # it is not finished
        return None
    record = summary.get("guard") if summary.get("ended_by") == "guard" else None
    return record if isinstance(record, dict) else None


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
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    seconds: float,
    tp: int,
    steps: int,
    begun: int = 0,
    ended_by: str = "steps",
    best: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the run's summary from its first and last evaluation; gaps are to the first one's text accuracy.

    Args:
        before: of the weights that the run began with.
        after: of its last step.
        seconds: spent in training.
        tp: of its layout.
        steps: made.
        begun: the step after which the run began, where it continues another's.
        ended_by: what ended the run: "steps", "hours", "early_stopping" or "guard".
        best: the best evaluation: step, set, metric and value.
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
        "ended_by": ended_by,
        "best": best,
    }
