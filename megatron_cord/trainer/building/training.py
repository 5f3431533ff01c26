"""The student, its teachers and the optimizer of a run, with their initial weights and states."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.model.layers.transformer import choose_fusions
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student, read_weights
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.optimizer.groups import check_groups
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """The objects that update the weights.

    Attributes:
        model: the student, wrapped in Megatron's DDP.
        optimizer: the student's.
        step: one training step, teachers included.
    """

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    step: TrainStep


def build_training(
    config: RunConfig, layout: Layout, start: Start, checkpoints: Checkpoints, rates: RateSchedule, pad_id: int
) -> Training:
    """Build the student, its teachers and the optimizer, and load their initial weights and states.

    Args:
        config: the run's.
        layout: this rank's.
        start: the weights and the progress that the run starts from.
        checkpoints: the run's; the one to start from is read through it.
        rates: the learning rates.
        pad_id: the padding token of batches.

    Raises:
        CordError: an optimizer group has no parameter, or the checkpoint does not fit the model.
    """
    check_groups(config.optimizer, load_architecture(config.model.checkpoint), config.model)
    student = build_student(config.model, layout, config.seed)
    if layout.is_main:
        logger.info("fused kernels: %s", choose_fusions(config.model.layer_config))
    if start.weights is not None:
        read_weights(start.weights, student, config.model)
    teachers = build_teachers(config, student, start.progress.made_with.trained)
    model = wrap_model(config.optimizer, student)
    optimizer, scheduler = build_optimizer(config.optimizer, model, config.train.steps, rates)
    step = TrainStep(
        model,
        teachers.pop(""),
        optimizer,
        scheduler,
        config.objective,
        config.train,
        pad_id,
        config.rollout.max_new_tokens,
        teachers,
    )
    if start.checkpoint is not None:
        checkpoints.load(start.checkpoint, model, optimizer, step.teacher.average)
    elif start.weights is not None and config.init_optimizer:
        checkpoints.load(start.weights, model, optimizer, None)
    scheduler.step(increment=start.progress.step)
    step.controllers.restore(start.progress.controllers)
    return Training(model, optimizer, step)


def build_teachers(config: RunConfig, student: LALM, trained: Collection[str]) -> dict[str, Teacher]:
    """Return the teachers by name, `teacher` under ""; equal ones are built once.

    Args:
        config: the run's.
        student: with its initial weights.
        trained: the parts whose weights earlier training changed.
    """
    audio_teachers, built = config.audio_teachers, dict[tuple[TeacherConfig, bool], Teacher]()
    found = {}
    for name, each in {"": config.teacher, **config.teachers}.items():
        with_audio = name in audio_teachers
        has_trained = bool(trained) if with_audio else "language_model" in trained
        if (each, with_audio) not in built:
            built[each, with_audio] = Teacher(
                each, student, config.model.checkpoint, has_trained=has_trained, with_audio=with_audio
            )
        found[name] = built[each, with_audio]
    return found
