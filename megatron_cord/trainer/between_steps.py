"""What a run does between two steps: save, evaluate, find whether it ends, and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from megatron_cord.rollout.types import TokenResults
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.trainer.building.parts import Parts
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch
from megatron_cord.trainer.step.batching.batches import TrainingSequence

logger = logging.getLogger(__name__)
#: Why a run makes no further step: they are made, its time is over, evaluations are no better, an accuracy has dropped
#: too far, it was asked to stop.
Ending = Literal["steps", "hours", "early_stopping", "guard", "request"]


class BetweenSteps:
    """Acts between the steps of a run. All ranks call its methods together.

    Args:
        parts: of the run.

    Attributes:
        progress: how far the run is.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self.progress = parts, parts.progress

    def evaluate(self) -> None:
        """Evaluate the current weights and write the result; keep their checkpoint if they are the best or guards held.

        Raises:
            CordError: the engine's weights are not the trainer's; or as `Evaluations.write`.
        """
        parts, step, begun = self._parts, self.progress.step, time.monotonic()
        parts.watchdog.rest()
        if parts.config.replay is not None:
            self.update_engine()
        ahead = parts.source.schedule.settle()  # the engine serves one caller at a time
        self.progress = replace(self.progress, ahead=ahead)
        metrics = parts.evaluations.answer(parts.source.engine, self._score_own, step)
        with parts.saving.first():
            check_mismatch(metrics, parts.config.rollout.max_logprob_mismatch, f"evaluation of step {step}")
            is_best = parts.evaluations.write(step)
        parts.budget.took("evaluation", time.monotonic() - begun)
        if is_best and parts.config.checkpoint.best:
            self.save_unsaved()
            if parts.saving.saved_step == step and parts.evaluations.best is not None:
                parts.saving.keep_best(parts.evaluations.best)
        guards = parts.evaluations.guards
        if guards.restores and step in guards.held_steps:
            self.save_unsaved()
            parts.saving.keep_held(guards.held_steps)

    def note_damage(self) -> None:
        """Say which samples the ranks have found damaged, and keep it for checkpoints."""
        self._parts.data.report_damage()
        self.progress = self._parts.data.state(self.progress)

    def update_engine(self) -> None:
        """Give the trained weights to the engine, as the version that the step's number names."""
        weights = ShardedModelWeights(self._parts.training.model.module, self.progress.made_with.trained)
        self._parts.source.engine.update_weights(weights, self.progress.step)

    def save(self) -> None:
        """Save a checkpoint of the present step."""
        parts, begun = self._parts, time.monotonic()
        parts.watchdog.phase("checkpoint", self.progress.step)
        ahead, budget = parts.source.schedule.settle(), parts.budget
        self.progress = replace(self.progress, ahead=ahead, spent=budget.spent, longest=dict(budget.longest))
        parts.saving.save(self.progress)
        budget.took("checkpoint", max(time.monotonic() - begun, parts.saving.write_seconds))

    def save_unsaved(self) -> None:
        """Save the present step, unless it is saved or made no finite loss."""
        if self.progress.step > self._parts.saving.saved_step and not self.progress.skipped_in_a_row:
            self.save()

    def find_ending(self) -> Ending | None:
        """Return why no further step is made; None for one that is."""
        parts = self._parts
        if parts.evaluations.guards.ends:
            return "guard"
        if self.progress.step >= parts.config.train.steps:
            return "steps"
        parts.saving.poll()
        asked, late = any_rank([bool(parts.stop), parts.budget.is_over()], parts.layout.device)
        if asked:
            return "request"
        if late:
            return "hours"
        return "early_stopping" if parts.evaluations.end_the_run else None

    def end(self, ending: Ending) -> bool:
        """End the run with its last checkpoint, evaluation, summary and export, or stop it with a checkpoint.

        Returns:
            whether the run is finished; else the same command continues it.
        """
        parts, step = self._parts, self.progress.step
        self.save_unsaved()
        if ending == "request":
            parts.saving.wait()
            saved = parts.saving.saved_step
            logger.info(f"asked to stop after step {step}; the same command continues after step {saved}")
            return False
        if not parts.evaluations.is_made(step):
            self.evaluate()
        parts.watchdog.rest()
        guard = self._end_by_guard(step)
        if guard is not None:
            ending = "guard"
            step = step if guard["restored"] is None else guard["restored"]
            if parts.config.checkpoint.best:
                parts.saving.restore_best(parts.evaluations.best_until(step))
        parts.saving.finish_with(step)
        parts.saving.wait()
        self._explain(ending)
        if parts.evaluations.guards.ended is None:  # else the summary is there
            parts.evaluations.finish(step, self.progress.seconds, ending, guard)
        if parts.saving.wait_for_exports(parts.stop):
            return True
        logger.info("asked to stop after the last step, before its export; the same command makes it")
        return False

    def _end_by_guard(self, step: int) -> dict[str, Any] | None:
        """Return the record of the guard that ends the run, which goes back where that is to be; None without one."""
        saving, guards = self._parts.saving, self._parts.evaluations.guards
        if guards.ended is not None:
            logger.info(
                "the guard %s ended this run after step %d; it stays at step %d, and goes on from there with other "
                "settings",
                *(guards.ended[key] for key in ("name", "step", "restored")),
            )
            return guards.ended
        if guards.triggered is None:
            return None
        action = self._parts.config.evaluation.guards[guards.triggered].action
        restored = saving.go_back(guards.held_steps) if action == "restore" else None
        record = guards.record(step, restored)
        words = "the run is finished"
        if restored is not None:
            words += f", and goes back to step {restored}, the last checkpoint at which the guards held"
        elif action == "restore":
            words += "; there is no checkpoint at which the guards held: what held is what it began with"
        logger.info("the guard %s ends the run after step %d: %s", record["name"], step, words)
        return record

    def _explain(self, ending: Ending) -> None:
        config, step = self._parts.config, self.progress.step
        if ending == "hours":
            logger.info(
                "train.hours=%g leaves no time for another step: the run is finished after step %d of %d (a larger "
                "train.hours continues it)",
                config.train.hours,
                step,
                config.train.steps,
            )
        elif ending == "early_stopping":
            logger.info(
                "%d evaluations in a row were no better (evaluation.early_stopping): the run is finished after step %d "
                "of %d; the best was %s",
                config.evaluation.early_stopping.patience,
                step,
                config.train.steps,
                self._parts.evaluations.best,
            )

    def _score_own(self, sequences: Sequence[TrainingSequence]) -> dict[int, TokenResults]:
        """Compute token results of sequences that all ranks pass; each data-parallel rank computes its share."""
        layout = self._parts.layout
        return self._parts.training.step.score(sequences[layout.dp_rank :: layout.dp_size])
