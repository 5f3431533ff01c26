"""What makes the rollouts of a run's steps: loader, engine, reference answers, rewards, and their schedule."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.data.audio.augmentation import augment
from megatron_cord.data.loader import Batch, SampleLoader
from megatron_cord.data.ordering.row import Row
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.reward.collective import build_rewards
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngineConfig
from megatron_cord.rollout.schedule import Schedule
from megatron_cord.runtime.files import checkpoint_fingerprint
from megatron_cord.trainer.answers.answers_in_time import AnswersInTime
from megatron_cord.trainer.answers.base_weights import base_weights, rebases
from megatron_cord.trainer.answers.given_responses import GivenResponses
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers
from megatron_cord.trainer.building.alignment import build_aligner
from megatron_cord.trainer.building.teacher_checkpoint import answering_engine
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.collection import Collector
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.teachers import TeacherRoutes

_BATCH = LocalEngineConfig.max_batch_size  #: reference answers that a rank makes together, at the least


@dataclass(frozen=True)
class RolloutSource:
    """What makes a step's rollouts.

    Attributes:
        engine: of all ranks.
        answers: when the teacher's reference answers are made.
        collector: requests, rewards and sequences of a batch.
        loader: gives each step its samples.
        schedule: gives each step its responses.
    """

    engine: CollectiveEngine
    answers: AnswersInTime
    collector: Collector
    loader: SampleLoader
    schedule: Schedule[Batch]


def build_rollout(
    config: RunConfig, layout: Layout, progress: Progress, prompts: PromptBuilder, row: Row, step: TrainStep
) -> RolloutSource:
    """Build loader, engine, reference answers, rewards, and their schedule.

    Args:
        config: of the run.
        layout: this rank's place.
        progress: how far the run is.
        prompts: of the checkpoint.
        row: the samples that the run trains on.
        step: whose model rewards may look into.

    Raises:
        CordError: experts are to be followed, and the model has none; or what engine and rewards raise.
    """
    if config.rollout.router_replay and step.lalm.routing is None:
        raise CordError(
            f"rollout.router_replay follows an engine's choice of experts, and {config.model.checkpoint} has none; set "
            "it to false"
        )
    directory = Path(config.output_dir)
    dtype = config.model.torch_dtype
    engine = build_engine(config.rollout, config.model.checkpoint, layout.device, dtype, prompts)
    own, lora = config.teacher.checkpoint, step.lalm.lora
    adapted = lora is not None and lora.has("language_model")
    answers = ReferenceAnswers(
        # The engine has one set of weights, the student's: a moving average answers with them, as a live teacher does.
        "frozen" if config.teacher.mode == "frozen" else "live",
        (lambda: base_weights(engine) if adapted else nullcontext(engine))
        if own is None
        else lambda: closing(answering_engine(config.rollout, config.teacher, layout.device, dtype)),
        prompts,
        config.rollout.max_new_tokens,
        directory / "reference_answers.jsonl",
        progress.made_with.model if own is None else checkpoint_fingerprint(checkpoint_directory(own)),
    )
    verifies = config.objective.verifies(config.reward.terms)
    rewards = build_rewards(config.reward, directory, layout.replica_group, verifies=verifies)
    routes = TeacherRoutes(config.data.training_sets)
    given = GivenResponses(prompts, config.rollout.max_new_tokens) if config.objective.given_fields else None
    aligner = build_aligner(config, layout, step)
    collector = Collector(
        config.rollout,
        config.objective,
        answers,
        rewards,
        config.seed,
        routes,
        given,
        aligner,
        compares=config.objective.compares(config.reward.terms),
    )
    loader = SampleLoader(
        row,
        batch_size=config.rollout.prompts_per_step,
        rank=layout.dp_rank,
        world=layout.dp_size,
        workers=config.data.workers,
        first_step=progress.step,
        first_sample=progress.samples,
        change=lambda sample, step: augment(
            sample, config.data.augmentation, seed=config.seed, step=step, limits=prompts.limits
        ),
        prepare=lambda samples, step: prompts.prepare(samples, collector.views, draw=f"{config.seed}\x1f{step}"),
        agree=all_gather_json,
    )
    schedule = Schedule(
        config.rollout.schedule,
        engine.within(layout.replica_group),
        loader.batch,
        collector.requests,
        config.train.steps,
    )
    # A language model whose own weights are and were frozen reads and answers text with the frozen teacher's at every
    # step: there is no LoRA beside them, or the engine can have them without it.
    is_frozen = "language_model" not in {*config.model.trained_parts, *progress.made_with.trained}
    if is_frozen and adapted:
        is_frozen = config.replay is None and rebases(engine)
    at_a_time = _BATCH * layout.world_size if is_frozen and own is None else None
    in_time = AnswersInTime(answers, loader, collector.answered_per_step, config.train.steps, at_a_time)
    return RolloutSource(engine, in_time, collector, loader, schedule)
