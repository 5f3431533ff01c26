"""Builds what a run consists of from its configuration: what trains, and what makes the rollouts of a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cord.config.loading import to_dict
from megatron_cord.data.audio.augmentation import augment
from megatron_cord.data.loader import Batch, SampleLoader
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.config import PARTS
from megatron_cord.parallel.layout import Layout
from megatron_cord.reward.collective import build_rewards
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.schedule import Schedule
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.progress import MadeWith, Progress
from megatron_cord.trainer.collection import Collector
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student, read_weights
from megatron_cord.trainer.reference_answers import ReferenceAnswers
from megatron_cord.trainer.settings_changes import Changes, find_changes, schedule_of
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.optimizer import RateSchedule, build_optimizer, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher


@dataclass(frozen=True)
class Description:
    """What a run says of itself.

    Attributes:
        rates: its learning rates.
        changes: what changed since the checkpoint that it goes on from.
        made_with: what later checkpoints say about their run.
    """

    rates: RateSchedule
    changes: Changes
    made_with: MadeWith


@dataclass(frozen=True)
class Training:
    """What makes the updates.

    Attributes:
        model: the wrapped student.
        optimizer: of the student.
        step: the train step, with the teacher.
    """

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    step: TrainStep


@dataclass(frozen=True)
class RolloutSource:
    """What makes a step's rollouts.

    Attributes:
        engine: of all ranks.
        answers: the teacher's reference answers.
        collector: requests, rewards and sequences of a batch.
        loader: gives each step its samples.
        schedule: gives each step its responses.
    """

    engine: CollectiveEngine
    answers: ReferenceAnswers
    collector: Collector
    loader: SampleLoader
    schedule: Schedule[Batch]


def describe(config: RunConfig, start: Start, data: dict[str, Any]) -> Description:
    """Find what changed since the checkpoint, and what later checkpoints say about their run.

    Args:
        config: of the run.
        start: where it begins.
        data: samples and fingerprint of what it trains on.
    """
    before, settings = start.progress.made_with, to_dict(config)
    planned = RateSchedule.of(config.optimizer, config.train.steps)
    rates = schedule_of(start, planned, keep=config.optimizer.keep_schedule)
    model = checkpoint_fingerprint(checkpoint_directory(config.model.checkpoint))
    changes = find_changes(start, settings, rates, model)
    trained = {*before.trained, *(part for part in PARTS if part not in config.model.freeze)}
    made_with = replace(
        before, settings=settings, schedule=asdict(rates), data=data, model=model, trained=sorted(trained)
    )
    return Description(rates, changes, made_with)


def build_training(
    config: RunConfig, layout: Layout, start: Start, checkpoints: Checkpoints, rates: RateSchedule, pad_id: int
) -> Training:
    """Build the student, its teacher and the optimizer, with the weights and states that the run begins with.

    Args:
        config: of the run.
        layout: this rank's place.
        start: where the run begins.
        checkpoints: of the run; they read the one that it begins with.
        rates: the learning rates.
        pad_id: fills padding.
    """
    student = build_student(config.model, layout)
    if start.weights is not None:
        read_weights(start.weights, student)
    trained = start.progress.made_with.trained
    teacher = Teacher(config.teacher, student, config.model.checkpoint, has_trained="language_model" in trained)
    model = wrap_model(config.optimizer, student)
    optimizer, scheduler = build_optimizer(config.optimizer, model, config.train.steps, rates)
    step = TrainStep(model, teacher, optimizer, scheduler, config.objective, config.train, pad_id)
    if start.checkpoint is not None:
        checkpoints.load(start.checkpoint, model, optimizer, teacher.average)
    elif start.weights is not None and config.init_optimizer:
        checkpoints.load(start.weights, model, optimizer, None)
    scheduler.step(increment=start.progress.step)
    return Training(model, optimizer, step)


def build_rollout(
    config: RunConfig, layout: Layout, progress: Progress, prompts: PromptBuilder, questions: ShardDataset
) -> RolloutSource:
    """Build loader, engine, reference answers, rewards, and their schedule.

    Args:
        config: of the run.
        layout: this rank's place.
        progress: how far the run is.
        prompts: of the checkpoint.
        questions: what the run trains on.
    """
    directory = Path(config.output_dir)
    engine = build_engine(config.rollout, config.model.checkpoint, layout.device)
    answers = ReferenceAnswers(
        # The engine has one set of weights, the student's: a moving average answers with them, as a live teacher does.
        "frozen" if config.teacher.mode == "frozen" else "live",
        engine,
        prompts,
        config.rollout.max_new_tokens,
        directory / "reference_answers.jsonl",
        progress.made_with.model,
    )
    rewards = build_rewards(config.reward, directory, layout.replica_group)
    collector = Collector(config.rollout, config.objective, answers, rewards, config.seed)
    loader = SampleLoader(
        questions,
        batch_size=config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        rank=layout.dp_rank,
        world=layout.dp_size,
        workers=config.data.workers,
        first_step=progress.step,
        first_sample=progress.samples,
        change=lambda sample, step: augment(
            sample, config.data.augmentation, seed=config.seed, step=step, limits=prompts.limits
        ),
        prepare=partial(prompts.prepare, views=collector.views),
    )
    schedule = Schedule(
        config.rollout.schedule,
        engine.within(layout.replica_group),
        loader.batch,
        collector.requests,
        config.train.steps,
    )
    return RolloutSource(engine, answers, collector, loader, schedule)
