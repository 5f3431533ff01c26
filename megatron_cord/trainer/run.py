"""A run: the parts of a step that `megatron_cord.train` calls, its beginning and its end.

What it simplifies: one object on each rank, whose methods all ranks call together in the same order.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.profiler import record_function

from megatron_cord.config.loading import dump_config
from megatron_cord.data.loader import Batch
from megatron_cord.data.ordering.damage import DamageLimitError
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.memory_use import reset_peak
from megatron_cord.rollout.types import GenerationRequest, Rollout, ScoredRollout
from megatron_cord.runtime.exit_status import STOPPED
from megatron_cord.trainer.between_steps import BetweenSteps
from megatron_cord.trainer.building.parts import put_together
from megatron_cord.trainer.collection import gather_rollouts
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.dynamic_sampling import replace_groups
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch
from megatron_cord.trainer.observability.rollout_dump import read_dump, recorded_streams
from megatron_cord.trainer.observability.throughput import StepWork, Utilise, measure_throughput
from megatron_cord.trainer.settings_changes import record_changes
from megatron_cord.trainer.step.optimizer.building import release
from megatron_cord.trainer.step.step import StepResult
from megatron_cord.trainer.step_metrics import step_metrics
from megatron_cord.trainer.training_data import FILE_NAME

logger = logging.getLogger(__name__)


class Run:
    """One training run on one rank; all ranks call its methods together. A context manager.

    Args:
        config: the whole configuration.
        layout: this rank's place.
        utilise: returns the metrics of model FLOP utilisation.

    Attributes:
        status: the exit status: 0, or `exit_status.STOPPED`.
    """

    def __init__(self, config: RunConfig, layout: Layout, utilise: Utilise) -> None:
        self.config, self.layout = config, layout
        self._parts = put_together(config, layout)
        step = self._parts.training.step
        self._utilise: Callable[[StepWork, float], Mapping[str, float]]
        self._utilise = partial(utilise, step.lalm.arch, step.teacher.model.arch)
        if any(teacher.model.arch != step.teacher.model.arch for teacher in step.teachers.values()):
            logger.info("no metric model_flop_utilisation: teachers are models of several sizes")
            self._utilise = lambda work, seconds: {}
        self._source, self._watchdog = self._parts.source, self._parts.watchdog
        self._between = BetweenSteps(self._parts)
        self._rollout_times: dict[str, float] = {}
        self._generated: list[Rollout] = []
        self._work = StepWork.of((), ())
        self.status = 0

    def __enter__(self) -> Self:
        self._parts.log.__enter__()
        self._parts.stop.__enter__()
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
            self._parts.saving.wait()
        self._parts.saving.close()
        self._parts.profiler.close()
        self._watchdog.__exit__(kind, error, trace)
        self._parts.stop.__exit__(kind, error, trace)
        self._parts.log.__exit__(kind, error, trace)
        self._source.schedule.close()
        self._source.loader.close()
        self._source.engine.close()
        release(self._parts.training.model)

    def _begin(self) -> None:
        parts, between, step = self._parts, self._between, self._between.progress.step
        if step:
            logger.info("resuming after step %d", step)
        if self.layout.is_main:
            record_changes(parts.directory, parts.start, parts.changes)
            dump_config(self.config, parts.directory / "config.yaml")
        if skipped := parts.data.skipped:
            message = "%d samples of data.train cannot be used and are skipped; see %s"
            logger.info(message, skipped, parts.directory / FILE_NAME)
        if self.config.replay is None:
            stop, device = parts.stop, self.layout.device  # before the engine gets trained weights
            self._source.answers.begin(step, between.note_damage, lambda: any_rank([bool(stop)], device)[0])
        if step or parts.start.weights is not None:
            between.update_engine()
        if step:
            self._source.schedule.restore(between.progress.ahead, step)
        if self.config.checkpoint.best:
            parts.saving.restore_best(parts.evaluations.best)
        if parts.evaluations.guards.restores:
            parts.saving.keep_held(parts.evaluations.guards.held_steps)
        # A run that was stopped between a checkpoint and its evaluation makes up for it.
        if parts.start.begins or (parts.evaluations.is_due(step) and not parts.evaluations.is_made(step)):
            between.evaluate()

    # The parts of a step, in their order.

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain, counted from 0; then end the run, or stop it."""
        first = self._between.progress.step
        while (ending := self._between.find_ending()) is None:
            if self._between.progress.step == first:
                self._parts.evaluations.withdraw_summary(first)
            self._watchdog.phase("rollout", self._between.progress.step + 1)
            reset_peak()
            self._parts.profiler.begin(self._between.progress.step + 1)
            yield self._between.progress.step
            self._parts.profiler.end()
        self.status = 0 if self._between.end(ending) else STOPPED

    def batch(self, step: int) -> Batch:
        """Return this data-parallel rank's samples of the step, with their prompts and features.

        Raises:
            DamageLimitError: more of the data is damaged than may be left out; what was trained is saved before.
        """
        source = self._source
        with self._reading():
            return source.loader.batch(step) if self.config.replay is not None else source.schedule.batch(step)

    @record_function("cord.rollout")
    def generate(self, batch: Batch) -> list[Rollout]:
        """Return the engine's responses to the batch, and begin the steps ahead; empty in a replay.

        Raises:
            DamageLimitError: as `batch`, of the questions whose reference answers are made before.
        """
        if self.config.replay is not None:
            return []
        source = self._source
        if source.answers.lacks(batch.step):
            source.schedule.wait()
            self._watchdog.rest()  # shards of later steps may have to be fetched first, for however long
            with self._reading():
                source.answers.make(batch.step)
            self._watchdog.phase("rollout", batch.step + 1)
        self._generated, self._rollout_times = source.schedule.rollouts(batch.step)
        return self._generated

    @record_function("cord.reward")
    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Return the step's rollouts on all ranks with rewards and advantages; in a replay, from the dump."""
        if self.config.replay is not None:
            ids = [self._parts.data.row.id_of(address) for address in self._source.loader.addresses(batch.step)]
            dump = Path(self.config.replay)
            recorded = read_dump(dump, batch.step + 1, ids)
            streams = recorded_streams(dump, batch.step + 1)
            self.config.objective.check_recorded(streams, self.config.rollout.policy_rollouts, self.config.replay)
            return recorded
        source = self._source
        # A reward of the model's layers needs a forward pass, and with it the memory of a colocated engine.
        with source.schedule.training() if source.collector.aligner is not None else nullcontext():
            scored = source.collector.score(batch, rollouts)
        if self.config.rollout.dynamic_sampling:
            engine = source.engine.within(self.layout.replica_group)

            def generate(requests: Sequence[GenerationRequest]) -> list[Rollout]:
                self._watchdog.phase("rollout", batch.step + 1)  # a round lasts as long as a rollout
                return engine.generate(requests)

            scored = replace_groups(self.config.rollout, source.collector, batch, scored, generate)
        return gather_rollouts(scored, self.layout.replica_group)

    @record_function("cord.update")
    def update(self, batch: Batch, rollouts: Sequence[ScoredRollout]) -> StepResult:
        """Make one step's updates, each with teacher forward, student forward and backward."""
        progress = self._between.progress

        def begin_update() -> None:
            self._watchdog.phase("update", progress.step + 1)

        begin_update()
        with self._source.schedule.training():
            sequences = self._source.collector.sequences(batch, rollouts)
            self._work = StepWork.of(self._generated, sequences)
            result = self._parts.training.step(sequences, rollouts, begin_update)
        skipped = progress.skipped_in_a_row + 1 if result.skipped else 0
        self._between.progress = replace(
            progress,
            step=progress.step + 1,
            samples=progress.samples + self.config.rollout.prompts_per_step,
            skipped_in_a_row=skipped,
            controllers=self._parts.training.step.controllers.state(),
            ahead={},
        )
        if result.skipped:
            logger.info(
                f"step {progress.step + 1}: the loss or a gradient is not finite; the update is skipped ({skipped} "
                "in a row)"
            )
        return result

    @record_function("cord.weight_sync")
    def sync_weights(self) -> None:
        """Give the trained weights to the engine, as the version that the step's number names."""
        self._watchdog.phase("weight_sync", self._between.progress.step)
        if self.config.replay is None:
            with self._source.schedule.syncing_weights():
                self._between.update_engine()

    @record_function("cord.record")
    def finish_step(self, result: StepResult, times: dict[str, float]) -> None:
        """Record the step; save and evaluate when it is time.

        Raises:
            CordError: too many steps in a row had a loss or gradients that are not finite, or the logprob mismatch is
                too large.
        """
        parts, between, step = self._parts, self._between, self._between.progress.step
        self._watchdog.phase("record", step)
        between.progress = replace(between.progress, seconds=between.progress.seconds + times["seconds"])
        parts.budget.took("step", times["seconds"])
        metrics = step_metrics(self.config, result, step - 1, self._rollout_times) | times
        seconds = {name: value for name, value in metrics.items() if name.startswith("seconds")}
        passes = self.config.train.passes
        metrics |= measure_throughput(self._work, seconds, passes, self.layout, self._utilise)
        metrics |= parts.data.metrics(between.progress.samples)
        parts.log.step(step, metrics | {"skipped": result.skipped})
        parts.dump.write(step, result.rollouts)
        with parts.saving.first():
            if self.config.replay is None:  # a dump may be of another model
                check_mismatch(metrics, self.config.rollout.max_logprob_mismatch, f"step {step}")
            self._check_skipped(step)
        # Weights that make no finite loss must not push out checkpoints of weights that did.
        if step == self.config.train.steps or (parts.saving.is_due(step) and not result.skipped):
            between.save()
        if parts.evaluations.is_due(step):
            between.evaluate()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Note the damage that is found in the data; where it is more than may be left out, save what was trained."""
        try:
            yield
        except DamageLimitError:  # on all ranks together
            self._between.save_unsaved()
            self._parts.saving.wait()
            raise
        self._between.note_damage()

    def _check_skipped(self, step: int) -> None:
        skipped = self._between.progress.skipped_in_a_row
        if skipped >= self.config.train.max_skipped_in_a_row:
            raise CordError(
                f"{skipped} steps in a row had no finite loss (train.max_skipped_in_a_row); lower "
                f"optimizer.learning_rate or look at the rollouts of step {step - skipped + 1}"
            )
