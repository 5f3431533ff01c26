"""A run: its components, put together from the configuration, and the parts of a step that `megatron_cord.train` calls.

What it simplifies: one object on each rank, whose methods all ranks call together in the same order.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_cord.config.loading import dump_config, to_dict
from megatron_cord.data.audio.augmentation import augment
from megatron_cord.data.loader import Batch, SampleLoader
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_file, past_evaluations, read_result, step_label
from megatron_cord.evaluation.formats import load_set, shard_questions
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.config import PARTS
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.reward.collective import build_rewards
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.schedule import Schedule, staleness
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime.exit_status import STOPPED
from megatron_cord.runtime.files import checkpoint_fingerprint, write_json
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.progress import MadeWith
from megatron_cord.trainer.checkpoint.storage import make_writable
from megatron_cord.trainer.collection import Collector, gather_rollouts, rollout_metrics
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.data_fingerprint import FILE_NAME as DATA_RECORD
from megatron_cord.trainer.data_fingerprint import keep_data_record
from megatron_cord.trainer.evaluation import measure_divergence, summarize
from megatron_cord.trainer.model_setup import build_student, read_weights
from megatron_cord.trainer.observability.logprob_mismatch import check_mismatch, importance_metrics, mismatch_metrics
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.rollout_dump import RolloutDump, read_dump
from megatron_cord.trainer.observability.watchdog import Watchdog
from megatron_cord.trainer.reference_answers import ReferenceAnswers
from megatron_cord.trainer.settings_changes import find_changes, record_changes, schedule_of
from megatron_cord.trainer.signals import StopRequest
from megatron_cord.trainer.start import find_start
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.optimizer.groups import check_groups
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule
from megatron_cord.trainer.step.step import StepResult, TrainStep
from megatron_cord.trainer.step.teacher import Teacher

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
        before = self.progress.made_with
        data = keep_data_record(self.directory, self._questions, before.data, main=layout.is_main)
        self._describe(data)
        self._build_model()
        self._build_rollout()
        questions = sets | {HELDOUT: shard_questions(held_out, config.evaluation.samples)}
        self.evaluator = Evaluator(config.evaluation, questions, self.prompts, self.directory, writes=layout.is_main)
        self.evaluator.prepare()
        self._open_outputs()
        self._stop = StopRequest()
        self._watchdog = Watchdog(config.train.watchdog_seconds, self.directory / "stacks", layout.rank)
        self._rollout_times: dict[str, float] = {}
        self.status = 0

    def _describe(self, data: dict[str, Any]) -> None:
        """Find what changed since the checkpoint, and what later checkpoints say about their run."""
        config, before, settings = self.config, self.progress.made_with, to_dict(self.config)
        planned = RateSchedule.of(config.optimizer, config.train.steps)
        self.rates = schedule_of(self.start, planned, keep=config.optimizer.keep_schedule)
        model = checkpoint_fingerprint(checkpoint_directory(config.model.checkpoint))
        self.changes = find_changes(self.start, settings, self.rates, model)
        trained = {*before.trained, *(part for part in PARTS if part not in config.model.freeze)}
        made_with = MadeWith(settings, asdict(self.rates), data, model, sorted(trained), before.begun)
        self.progress = replace(self.progress, made_with=made_with)

    def _build_model(self) -> None:
        """Build the student, its teacher and the optimizer, with the weights and states that the run begins with."""
        config, start = self.config, self.start
        check_groups(config.optimizer, load_architecture(config.model.checkpoint), config.model.freeze)
        student = build_student(config.model, self.layout)
        if start.weights is not None:
            read_weights(start.weights, student)
        trained = start.progress.made_with.trained
        teacher = Teacher(config.teacher, student, config.model.checkpoint, has_trained="language_model" in trained)
        self.model = wrap_model(config.optimizer, student)
        self.optimizer, self.scheduler = build_optimizer(config.optimizer, self.model, config.train.steps, self.rates)
        self.train_step = TrainStep(
            self.model, teacher, self.optimizer, self.scheduler, config.objective, config.train, self.prompts.pad_id
        )
        if start.checkpoint is not None:
            self.checkpoints.load(start.checkpoint, self.model, self.optimizer, teacher.average)
        elif start.weights is not None and config.init_optimizer:
            self.checkpoints.load(start.weights, self.model, self.optimizer, None)
        self.scheduler.step(increment=self.progress.step)
        self.saved_step = self.progress.step

    def _build_rollout(self) -> None:
        """Build what makes a step's rollouts: loader, engine, reference answers, rewards, and their schedule."""
        config, layout = self.config, self.layout
        self.engine = build_engine(config.rollout, config.model.checkpoint, layout.device)
        self._answers = ReferenceAnswers(
            # The engine has one set of weights, the student's: a moving average answers with them, as a live teacher
            # does.
            "frozen" if config.teacher.mode == "frozen" else "live",
            self.engine,
            self.prompts,
            config.rollout.max_new_tokens,
            self.directory / "reference_answers.jsonl",
            self.progress.made_with.model,
        )
        rewards = build_rewards(config.reward, self.directory, layout.replica_group)
        self.collector = Collector(config.rollout, config.objective, self._answers, rewards, config.seed)
        self.loader = SampleLoader(
            self._questions,
            batch_size=config.rollout.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
            rank=layout.dp_rank,
            world=layout.dp_size,
            workers=config.data.workers,
            first_step=self.progress.step,
            first_sample=self.progress.samples,
            change=lambda sample, step: augment(
                sample, config.data.augmentation, seed=config.seed, step=step, limits=self.prompts.limits
            ),
            prepare=partial(self.prompts.prepare, views=self.collector.views),
        )
        self.schedule = Schedule(
            config.rollout.schedule,
            self.engine.within(layout.replica_group),
            self.loader.batch,
            self.collector.requests,
            config.train.steps,
        )

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
        if self.start.begins or (
            self._evaluation_is_due(step) and not broadcast_json(heldout_file(self.directory, step).is_file())
        ):
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
        metrics = self._metrics(result) | times
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
        if self._evaluation_is_due(step):
            self.evaluate(step)

    def _metrics(self, result: StepResult) -> dict[str, Any]:
        rollouts, objective = result.rollouts, self.config.objective
        metrics: dict[str, Any] = result.metrics | rollout_metrics(rollouts, self.config.rollout.policy_rollouts)
        metrics |= self._rollout_times
        clip_norm, norm = self.config.optimizer.clip_norm, metrics["grad_norm"]
        if clip_norm:
            metrics["gradient_clipped"] = norm if math.isnan(norm) else float(norm > clip_norm)
        version = self.progress.step - 1
        if objective.responses == "student":  # the teacher's responses come from another prompt
            cap = objective.policy_gradient.importance_cap
            metrics |= mismatch_metrics(rollouts, version) | importance_metrics(rollouts, cap)
        if self.config.replay is None:
            generated = rollouts if objective.responses == "student" else []
            metrics |= staleness([r.rollout for r in generated], version, None)
        return metrics

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
        metrics = self.evaluator.answer_anew(self.engine, partial(measure_divergence, self._score_own, step))
        with self._saving_first():
            check_mismatch(metrics, self.config.rollout.max_logprob_mismatch, f"evaluation of step {step}")
        results = self.evaluator.score(step_label(step), step)
        result = results.pop(HELDOUT)
        self.log.evaluation({"step": step} | result)
        for name, other in results.items():
            self.log.question_set(step, name, other)
        before = heldout_file(self.directory, self.progress.made_with.begun)
        if self.layout.is_main and step == self.config.train.steps and before.is_file():
            summary = summarize(
                read_result(before),
                result,
                seconds=round(self.progress.seconds, 1),
                tp=self.layout.config.tp,
                steps=step,
                begun=self.progress.made_with.begun,
            )
            write_json(self.directory / "summary.json", summary)

    def _score_own(self, sequences: Sequence[TrainingSequence]) -> dict[int, TokenResults]:
        """Compute token results of sequences that all ranks pass; each data-parallel rank computes its share."""
        return self.train_step.score(sequences[self.layout.dp_rank :: self.layout.dp_size])

    def _evaluation_is_due(self, step: int) -> bool:
        interval = self.config.evaluation.interval
        return step == self.config.train.steps or bool(interval and step % interval == 0)

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
