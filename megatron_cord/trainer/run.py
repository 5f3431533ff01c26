"""A run: its components put together from the configuration, and what the loop in `megatron_cord.train` asks of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_cord.config.loading import dump_config, to_dict
from megatron_cord.data.augmentation import augment
from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_file, past_evaluations, read_result, step_label
from megatron_cord.evaluation.formats import shard_questions
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.reward.collective import build_rewards
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.schedule import Schedule
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.runtime.exit_status import STOPPED
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.directory import check_whole
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.checkpoint.storage import make_writable
from megatron_cord.trainer.collection import Collected, Collector, collection_metrics
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.data_fingerprint import FILE_NAME as DATA_RECORD
from megatron_cord.trainer.data_fingerprint import keep_data_record
from megatron_cord.trainer.evaluation import measure_divergence, summarize
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.observability.logprob_mismatch import agreement_metrics, check_agreement, importance_metrics
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.rollout_dump import RolloutRecord, read_record
from megatron_cord.trainer.observability.watchdog import Watchdog
from megatron_cord.trainer.reference_answers import TeacherAnswers
from megatron_cord.trainer.signals import StopRequest
from megatron_cord.trainer.step.optimizer import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.step import StepResult, TrainStep
from megatron_cord.trainer.step.teacher import Teacher


class Run:
    """One training run on one rank; all ranks call its methods together. A context manager.

    Args:
        config: the whole configuration.
        layout: this rank's place.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.directory = Path(config.output_dir)
        make_writable(self.directory)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", config.checkpoint)
        resume_from = self._resume_from()
        self.prompts = PromptBuilder(
            config.model.checkpoint, long_audio=config.data.long_audio, features=config.data.features
        )
        self._questions = config.data.open("train", self.prompts.longest_clip)
        self.loader = SampleLoader(
            self._questions,
            batch_size=config.rollout.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
            workers=config.data.workers,
            change=lambda sample, step: augment(
                sample, config.data.augmentation, seed=config.seed, step=step, longest=self.prompts.longest_clip
            ),
            prepare=self.prompts.audio_prompts,
        )
        held_out = config.data.open("evaluation", self.prompts.longest_clip)
        student = build_student(config.model, layout)
        teacher = Teacher(config.teacher, student, config.model.checkpoint)
        self.model = wrap_model(config.optimizer, student)
        self.optimizer, self.scheduler = build_optimizer(config.optimizer, self.model, config.train.steps)
        self.progress = Progress(0, 0.0, 0, config.seed)
        if resume_from is not None:
            self.progress = self.checkpoints.load(
                resume_from, self.model, self.optimizer, self.scheduler, teacher.average
            )
            if self.progress.seed != config.seed:
                raise CordError(
                    f"{resume_from} belongs to a run with seed={self.progress.seed}; resume with that seed or choose another output_dir"
                )
        keep_data_record(self.directory, self._questions, resumed=self.progress.step > 0, writes=layout.is_main)
        self.saved_step = self.progress.step
        self.engine = build_engine(config.rollout, config.model.checkpoint, layout.device)
        answers = TeacherAnswers(
            # The engine has one set of weights, the student's: a moving average answers through them, as a live teacher does.
            "frozen" if config.teacher.mode == "frozen" else "live",
            self.engine,
            self.prompts,
            config.rollout.max_new_tokens,
            self.directory / "teacher_answers.jsonl",
        )
        rewards = build_rewards(config.reward, self.directory)
        self.collector = Collector(config.rollout, config.objective, self.prompts, answers, rewards, config.seed)
        self.batch = lru_cache(maxsize=config.rollout.ahead + 1)(
            self.loader.batch
        )  #: samples of a step; those asked for ahead are kept
        self.schedule = Schedule(
            config.rollout,
            self.engine,
            lambda step: self.collector.requests(self.batch(step), step),
            config.train.steps,
        )
        self._times: dict[str, float] = {}
        questions = {HELDOUT: shard_questions(held_out, config.evaluation.samples)}
        self.evaluator = Evaluator(config.evaluation, questions, self.prompts, self.directory, writes=layout.is_main)
        self.evaluator.prepare()
        self.train_step = TrainStep(
            self.model, teacher, self.optimizer, self.scheduler, config.objective, config.train, self.prompts.pad_id
        )
        record = config.record.rollouts
        rollouts = None if record is None else self.directory / record
        self.record = RolloutRecord(rollouts, self.prompts, self.progress.step, enabled=layout.is_main)
        self.log = MetricsLog(
            self.directory,
            config.train.steps,
            self.progress.step,
            config.metrics,
            config.alerts,
            evaluations=past_evaluations(self.directory, self.progress.step) if layout.is_main else (),
            settings=to_dict(config),
            enabled=layout.is_main,
        )
        self._answers = answers
        self._stop = StopRequest()
        self._watchdog = Watchdog(config.train.watchdog_seconds, self.directory / "stacks", layout.rank)
        self.status = 0  #: the exit status: 0, or `cli.STOPPED`

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
        if self.layout.is_main:
            dump_config(self.config, self.directory / "config.yaml")
        step = self.progress.step
        if step:
            self.log.say(f"resuming after step {step}")
        if skipped := sum(item.samples for item in self._questions.skipped):
            self.log.say(
                f"{skipped} samples of data.train cannot be used and are skipped; see {self.directory / DATA_RECORD}"
            )
        if self.config.replay is None:
            self._prepare_answers()  # before the engine gets trained weights
        if step:
            self._update_engine()
            self.schedule.restore(self.progress.ahead, step)
        # A run that was stopped between a checkpoint and its evaluation makes up for it.
        if not step or (
            self._evaluation_is_due(step) and not broadcast_json(heldout_file(self.directory, step).is_file())
        ):
            self.evaluate(step)

    def steps(self) -> Iterator[int]:
        """The steps that remain, counted from 0; each yielded one is timed, saved and evaluated when its turn is over. Ends early when asked to."""
        while self.progress.step < self.config.train.steps:
            self.checkpoints.poll()
            if self._stop.agreed(self.layout.device):
                self._stop_here()
                return
            self._watchdog.phase("rollout", self.progress.step + 1)
            yield self.progress.step

    def _stop_here(self) -> None:
        step = self.progress.step
        if step > self.saved_step and not self.progress.skipped_in_a_row:
            self._save()
        self.checkpoints.wait()
        self.log.say(f"asked to stop after step {step}; the same command continues after step {self.saved_step}")
        self.status = STOPPED

    def _save(self) -> None:
        self._watchdog.phase("checkpoint", self.progress.step)
        self.progress = replace(self.progress, ahead=self.schedule.settle())
        self.checkpoints.save(self.progress, self.model, self.optimizer, self.train_step.teacher.average)
        self.saved_step = self.progress.step

    def collect(self, samples: list[Sample], step: int) -> list[Collected]:
        """Rollouts and rewards of the step, from the engine or from a record."""
        if self.config.replay is not None:
            return read_record(Path(self.config.replay), step + 1, samples)
        rollouts, self._times = self.schedule.rollouts(step)
        return self.collector.collect(samples, rollouts, step)

    def train(self, collected: list[Collected]) -> StepResult:
        """One optimizer step."""
        self._watchdog.phase("update", self.progress.step + 1)
        with self.schedule.training():
            result = self.train_step(
                self.collector.sequences(collected), [c.rollout for c in collected if c.reward is not None]
            )
        skipped = self.progress.skipped_in_a_row + 1 if result.skipped else 0
        self.progress = Progress(self.progress.step + 1, self.progress.seconds, skipped, self.config.seed)
        if result.skipped:
            self.log.say(
                f"step {self.progress.step}: the loss or a gradient is not finite; the update is skipped ({skipped} in a row)"
            )
        return result

    def sync_weights(self) -> None:
        """Gives the trained weights to the engine, as the version that the step's number names."""
        self._watchdog.phase("weight_sync", self.progress.step)
        if self.config.replay is None:
            with self.schedule.syncing_weights():
                self._update_engine()

    def finish_step(self, collected: list[Collected], result: StepResult, times: dict[str, float]) -> None:
        """Records the step; evaluates and saves when it is time.

        Raises:
            CordError: too many steps in a row had a loss or gradients that are not finite, or trainer and engine do not agree.
        """
        step = self.progress.step
        self._watchdog.phase("record", step)
        self.progress = replace(self.progress, seconds=self.progress.seconds + times["seconds"])
        metrics: dict[str, Any] = (
            result.metrics | collection_metrics(collected, self.config.rollout.policy_rollouts) | self._times | times
        )
        metrics |= self._compare_with_engine(collected, result, step - 1)
        self.log.step(step, metrics | {"skipped": result.skipped})
        self.record.write(step, collected, result.tokens)
        with self._saving_first():
            if self.config.replay is None:  # a record may be of another model
                check_agreement(metrics, self.config.rollout.agreement_limit, f"step {step}")
            skipped = self.progress.skipped_in_a_row
            if skipped >= self.config.train.max_skipped_in_a_row:
                raise CordError(
                    f"{skipped} steps in a row had no finite loss (train.max_skipped_in_a_row); lower optimizer.learning_rate or look "
                    f"at the rollouts of step {step - skipped + 1}"
                )
        interval = self.config.checkpoint.interval
        # Weights that make no finite loss must not push out checkpoints of weights that did.
        if step == self.config.train.steps or (interval and step % interval == 0 and not result.skipped):
            self._save()
        if self._evaluation_is_due(step):
            self.evaluate(step)

    @contextmanager
    def _saving_first(self) -> Iterator[None]:
        """Around checks that fail on every rank or on none: the checkpoint that is being written is completed before the run ends."""
        try:
            yield
        except CordError:
            self.checkpoints.wait()
            raise

    def _compare_with_engine(self, collected: list[Collected], result: StepResult, version: int) -> dict[str, float]:
        objective, rollouts = self.config.objective, [c.rollout for c in collected]
        if objective.responses == "teacher":  # made by reading
            return {}
        trained = [c.advantage != 0 for c in collected]
        return agreement_metrics(result.tokens, rollouts, version) | importance_metrics(
            result.tokens, rollouts, trained, objective.policy_gradient.importance_cap
        )

    def _evaluation_is_due(self, step: int) -> bool:
        interval = self.config.evaluation.interval
        return step == self.config.train.steps or bool(interval and step % interval == 0)

    def evaluate(self, step: int) -> None:
        """Evaluates the current weights and writes the result; after the last step also the summary."""
        self._watchdog.rest()
        if self.config.replay is not None:
            self._update_engine()
        self.progress = replace(self.progress, ahead=self.schedule.settle())  # the engine answers one caller at a time
        measure = partial(measure_divergence, self.train_step.score, step)
        metrics = self.evaluator.answer_anew(self.engine, measure)
        with self._saving_first():
            check_agreement(metrics, self.config.rollout.agreement_limit, f"evaluation of step {step}")
        result = self.evaluator.score(step_label(step), step)[HELDOUT]
        self.log.evaluation({"step": step} | result)
        before = heldout_file(self.directory, 0)
        if self.layout.is_main and step == self.config.train.steps and before.is_file():
            summary = summarize(
                read_result(before),
                result,
                seconds=round(self.progress.seconds, 1),
                tp=self.layout.config.tp,
                steps=step,
            )
            write_json(self.directory / "summary.json", summary)

    def _update_engine(self) -> None:
        self.engine.update_weights(ShardedModelWeights(self.model.module), self.progress.step)

    def _prepare_answers(self) -> None:
        """A frozen teacher answers what the run will ask of it: the prompts of L_seq, or all of an off-policy run."""
        config = self.config
        per_step = config.rollout.policy_prompts_per_step if config.objective.policy_gradient.enabled else 0
        if config.objective.responses == "teacher":
            per_step = config.rollout.prompts_per_step
        if per_step:
            needed = {i for step in range(config.train.steps) for i in self.loader.indices(step)[:per_step]}
            self._answers.prepare(
                [self._questions[i] for i in sorted(needed)], resumed=self.progress.step > 0, say=self.log.say
            )

    def _resume_from(self) -> Path | None:
        if self.config.resume == "auto":
            return self.checkpoints.newest_undamaged()
        if self.config.resume != "never":
            return check_whole(Path(self.config.resume))
        newest = self.checkpoints.newest()
        if newest is not None:
            raise CordError(
                f"{newest} exists and resume=never was given; choose another output_dir, or resume=auto to continue that run"
            )
        return None
