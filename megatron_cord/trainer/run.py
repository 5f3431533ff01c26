"""A run: its components put together, the parts of a step that `megatron_cord.train` calls, and what is between steps.

What it simplifies: one object on each rank, whose methods all ranks call together in the same order.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_cord.config.loading import dump_config, to_dict
from megatron_cord.data.loader import Batch
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import past_evaluations
from megatron_cord.evaluation.formats import load_set, shard_questions
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.parallel.layout import Layout
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime.exit_status import STOPPED
from megatron_cord.trainer.building import build_rollout, build_training, describe
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.storage import make_writable
from megatron_cord.trainer.collection import gather_rollouts
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.data_fingerprint import FILE_NAME as DATA_RECORD
from megatron_cord.trainer.data_fingerprint import keep_data_record
from megatron_cord.trainer.evaluation import Evaluations
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.rollout_dump import RolloutDump, read_dump
from megatron_cord.trainer.observability.watchdog import Watchdog
from megatron_cord.trainer.settings_changes import record_changes
from megatron_cord.trainer.signals import StopRequest
from megatron_cord.trainer.start import find_start
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.optimizer import release
from megatron_cord.trainer.step.step import StepResult
from megatron_cord.trainer.step_metrics import step_metrics

logger = logging.getLogger(__name__)


class Run:
    """One training run on one rank; all ranks call its methods together. A context manager.

    Args:
        config: the whole configuration.
        layout: this rank's place.

    Attributes:
        progress: how far the run is.
        status: the exit status: 0, or `exit_status.STOPPED`.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.directory = Path(config.output_dir)
        make_writable(self.directory)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", config.checkpoint)
        self.start = find_start(config, self.checkpoints)
        self.progress = self.start.progress
        self.prompts = PromptBuilder(
            config.model.checkpoint, long_audio=config.data.long_audio, features=config.data.features
        )
        self._questions = config.data.open("train", self.prompts.limits)
        held_out = config.data.open("evaluation", self.prompts.limits)
        sets = {name: load_set(given) for name, given in config.evaluation.sets.items()}
        data = keep_data_record(self.directory, self._questions, self.progress.made_with.data, main=layout.is_main)
        described = describe(config, self.start, data)
        self.changes = described.changes
        self.progress = replace(self.progress, made_with=described.made_with)
        training = build_training(config, layout, self.start, self.checkpoints, described.rates, self.prompts.pad_id)
        self.model, self.optimizer, self.train_step = training.model, training.optimizer, training.step
        self.saved_step = self.progress.step
        source = build_rollout(config, layout, self.progress, self.prompts, self._questions)
        self.engine, self._answers, self.collector = source.engine, source.answers, source.collector
        self.loader, self.schedule = source.loader, source.schedule
        questions = sets | {HELDOUT: shard_questions(held_out, config.evaluation.samples)}
        evaluator = Evaluator(config.evaluation, questions, self.prompts, self.directory, writes=layout.is_main)
        evaluator.prepare()
        self._open_outputs()
        self.evaluations = Evaluations(
            evaluator,
            self.log,
            self.directory,
            interval=config.evaluation.interval,
            steps=config.train.steps,
            begun=self.progress.made_with.begun,
            tp=layout.config.tp,
            writes=layout.is_main,
        )
        self._stop = StopRequest()
        self._watchdog = Watchdog(config.train.watchdog_seconds, self.directory / "stacks", layout.rank)
        self._rollout_times: dict[str, float] = {}
        self.status = 0

    def _open_outputs(self) -> None:
        """Open the rollout dump and the metrics; what steps after the resumed one have left is dropped."""
        config, main = self.config, self.layout.is_main
        rollouts = None if config.record.rollouts is None else self.directory / config.record.rollouts
        self.dump = RolloutDump(rollouts, self.prompts, self.progress.step, enabled=main)
        self.log = MetricsLog(
            self.directory,
            config.train.steps,
            self.progress.step,
            config.metrics,
            config.alerts,
            evaluations=past_evaluations(self.directory, self.progress.step) if main else (),
            settings=to_dict(config),
            enabled=main,
        )

    def __enter__(self) -> Self:
        self.log.__enter__()
        self._stop.__enter__()
        self._watchdog.__enter__()
        try:
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.checkpoints.wait()
        self._watchdog.__exit__(kind, error, trace)
        self._stop.__exit__(kind, error, trace)
        self.log.__exit__(kind, error, trace)
        self.schedule.close()
        self.loader.close()
        self.engine.close()
        release(self.model)

    def _begin(self) -> None:
        step = self.progress.step
        if step:
            logger.info("resuming after step %d", step)
        if self.layout.is_main:
            record_changes(self.directory, self.start, self.changes)
            dump_config(self.config, self.directory / "config.yaml")
        if skipped := sum(item.samples for item in self._questions.skipped):
            message = "%d samples of data.train cannot be used and are skipped; see %s"
            logger.info(message, skipped, self.directory / DATA_RECORD)
        if self.config.replay is None:
            self._prepare_answers()  # before the engine gets trained weights
        if step or self.start.weights is not None:
            self._update_engine()
        if step:
            self.schedule.restore(self.progress.ahead, step)
        # A run that was stopped between a checkpoint and its evaluation makes up for it.
        if self.start.begins or self.evaluations.is_missing(step):
            self.evaluate(step)

    def _prepare_answers(self) -> None:
        """Let a frozen teacher answer what the run will need: the prompts of L_seq, or all of an off-policy run."""
        needed = self.collector.answered_per_step
        if needed:
            steps = range(self.progress.step, self.config.train.steps)
            indices = sorted({i for step in steps for i in self.loader.indices(step)[:needed]})
            self._answers.prepare(self._questions, indices, resumed=not self.start.begins)

    # The parts of a step, in their order.

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain, counted from 0; end early after a request to stop."""
        while self.progress.step < self.config.train.steps:
            self.checkpoints.poll()
            if self._stop.agreed(self.layout.device):
                self._stop_here()
                return
            self._watchdog.phase("rollout", self.progress.step + 1)
            yield self.progress.step

    def batch(self, step: int) -> Batch:
        """Return this data-parallel rank's samples of the step, with their prompts and features."""
        return self.loader.batch(step) if self.config.replay is not None else self.schedule.batch(step)

    def generate(self, batch: Batch) -> list[Rollout]:
        """Return the engine's responses to the batch, and begin the steps ahead; empty in a replay."""
        if self.config.replay is not None:
            return []
        rollouts, self._rollout_times = self.schedule.rollouts(batch.step)
        return rollouts

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Return the step's rollouts on all ranks with rewards and advantages; in a replay, from the dump."""
        if self.config.replay is not None:
            ids = [self._questions.id_of(i) for i in self.loader.indices(batch.step)]
            return read_dump(Path(self.config.replay), batch.step + 1, ids)
        return gather_rollouts(self.collector.score(batch, rollouts), self.layout.replica_group)

    def update(self, batch: Batch, rollouts: Sequence[ScoredRollout]) -> StepResult:
        """Make one optimizer step: teacher forward, student forward and backward, update."""
        self._watchdog.phase("update", self.progress.step + 1)
        with self.schedule.training():
            result = self.train_step(self.collector.sequences(batch, rollouts), rollouts)
        skipped = self.progress.skipped_in_a_row + 1 if result.skipped else 0
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            samples=self.progress.samples + self.config.rollout.prompts_per_step,
            skipped_in_a_row=skipped,
            ahead={},
        )
        if result.skipped:
            logger.info(
                f"step {self.progress.step}: the loss or a gradient is not finite; the update is skipped ({skipped} "
                "in a row)"
            )
        return result

    def sync_weights(self) -> None:
        """Give the trained weights to the engine, as the version that the step's number names."""
        self._watchdog.phase("weight_sync", self.progress.step)
        if self.config.replay is None:
            with self.schedule.syncing_weights():
                self._update_engine()

    def finish_step(self, result: StepResult, times: dict[str, float]) -> None:
        """Record the step; save and evaluate when it is time.

        Raises:
            CordError: too many steps in a row had a loss or gradients that are not finite, or the logprob mismatch is
                too large.
        """
        step = self.progress.step
        self._watchdog.phase("record", step)
        self.progress = replace(self.progress, seconds=self.progress.seconds + times["seconds"])
        metrics = step_metrics(self.config, result, step - 1, self._rollout_times) | times
        self.log.step(step, metrics | {"skipped": result.skipped})
        self.dump.write(step, result.rollouts)
        with self._saving_first():
            if self.config.replay is None:  # a dump may be of another model
                check_mismatch(metrics, self.config.rollout.max_logprob_mismatch, f"step {step}")
            self._check_skipped(step)
        interval = self.config.checkpoint.interval
        # Weights that make no finite loss must not push out checkpoints of weights that did.
        if step == self.config.train.steps or (interval and step % interval == 0 and not result.skipped):
            self._save()
        if self.evaluations.is_due(step):
            self.evaluate(step)

    def _check_skipped(self, step: int) -> None:
        skipped = self.progress.skipped_in_a_row
        if skipped >= self.config.train.max_skipped_in_a_row:
            raise CordError(
                f"{skipped} steps in a row had no finite loss (train.max_skipped_in_a_row); lower "
                f"optimizer.learning_rate or look at the rollouts of step {step - skipped + 1}"
            )

    # Between steps.

    def evaluate(self, step: int) -> None:
        """Evaluate the current weights and write the result; after the last step also the summary."""
        self._watchdog.rest()
        if self.config.replay is not None:
            self._update_engine()
        self.progress = replace(self.progress, ahead=self.schedule.settle())  # the engine serves one caller at a time
        metrics = self.evaluations.answer(self.engine, self._score_own, step)
        with self._saving_first():
            check_mismatch(metrics, self.config.rollout.max_logprob_mismatch, f"evaluation of step {step}")
        self.evaluations.write(step, self.progress.seconds)

    def _score_own(self, sequences: Sequence[TrainingSequence]) -> dict[int, TokenResults]:
        """Compute token results of sequences that all ranks pass; each data-parallel rank computes its share."""
        return self.train_step.score(sequences[self.layout.dp_rank :: self.layout.dp_size])

    def _update_engine(self) -> None:
        self.engine.update_weights(
            ShardedModelWeights(self.model.module, self.progress.made_with.trained), self.progress.step
        )

    def _save(self) -> None:
        self._watchdog.phase("checkpoint", self.progress.step)
        self.progress = replace(self.progress, ahead=self.schedule.settle())
        self.checkpoints.save(self.progress, self.model, self.optimizer, self.train_step.teacher.average)
        self.saved_step = self.progress.step

    @contextmanager
    def _saving_first(self) -> Iterator[None]:
        """Complete the checkpoint that is being written before a check ends the run, on every rank or on none."""
        try:
            yield
        except CordError:
            self.checkpoints.wait()
            raise

    def _stop_here(self) -> None:
        step = self.progress.step
        if step > self.saved_step and not self.progress.skipped_in_a_row:
            self._save()
        self.checkpoints.wait()
        logger.info(f"asked to stop after step {step}; the same command continues after step {self.saved_step}")
        self.status = STOPPED
