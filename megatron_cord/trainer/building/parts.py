"""All parts of a run, put together from its configuration in the order in which they need each other."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cord.config.loading import to_dict
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.sets import open_evaluation
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import past_evaluations
from megatron_cord.evaluation.formats import judged_sets, load_set, shard_questions
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.parallel.layout import Layout
from megatron_cord.runtime.stop_request import StopRequest
from megatron_cord.trainer.answers.given_responses import GivenResponses
from megatron_cord.trainer.building.description import describe
from megatron_cord.trainer.building.rollout import RolloutSource, build_rollout
from megatron_cord.trainer.building.teacher_checkpoint import check_teacher
from megatron_cord.trainer.building.training import Training, build_training
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.exports import Exports
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.checkpoint.saving import Saving
from megatron_cord.trainer.checkpoint.storage import make_writable
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.endings.guards import Guards
from megatron_cord.trainer.endings.time_budget import TimeBudget
from megatron_cord.trainer.evaluation import Evaluations, guard_ending
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.profiler import Profiler
from megatron_cord.trainer.observability.rollout_dump import RolloutDump
from megatron_cord.trainer.observability.watchdog import Watchdog
from megatron_cord.trainer.settings_changes import Changes, settings_fingerprint
from megatron_cord.trainer.start import Start, find_start
from megatron_cord.trainer.training_data import TrainingData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a run consists of on this rank.

    Attributes:
        config: the whole configuration.
        layout: this rank's place.
        directory: of the run.
        start: where it begins.
        progress: how far it is then.
        changes: settings that are others than those of the checkpoint that it goes on from.
        data: what it trains on.
        training: what makes updates.
        source: what makes rollouts.
        dump: of rollouts.
        log: of metrics.
        evaluations: of the run.
        saving: of its weights.
        budget: of its time.
        stop: takes note of requests to stop.
        watchdog: finds a rank that hangs.
        profiler: records chosen steps.
    """

    config: RunConfig
    layout: Layout
    directory: Path
    start: Start
    progress: Progress
    changes: Changes
    data: TrainingData
    training: Training
    source: RolloutSource
    dump: RolloutDump
    log: MetricsLog
    evaluations: Evaluations
    saving: Saving
    budget: TimeBudget
    stop: StopRequest
    watchdog: Watchdog
    profiler: Profiler


def put_together(config: RunConfig, layout: Layout) -> Parts:
    """Build all parts of a run. All ranks call it together.

    Raises:
        CordError: anything that the run needs is missing or does not fit.
    """
    directory, main, begun = Path(config.output_dir), layout.is_main, time.monotonic()
    _refuse_judged(config)
    profiler = Profiler(config.train.profile, directory, layout.rank, layout.world_size)
    make_writable(directory)
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint)
    start = find_start(config, checkpoints)
    before = start.progress
    budget = TimeBudget(config.train.hours, before.spent + time.monotonic() - begun, before.longest)
    prompts = PromptBuilder(
        config.model.checkpoint,
        long_audio=config.data.long_audio,
        features=config.data.features,
        views=config.views,
    )
    if config.equal_views and config.teacher.checkpoint is None and main:
        logger.warning(
            "student and teacher are the same model on the same view (%s): their divergence is 0 %s",
            ", ".join(config.equal_views),
            "until they part" if config.teacher.mode != "live" else "and trains nothing",
        )
    for name, each in {"": config.teacher, **config.teachers}.items():
        if each.checkpoint is not None:
            key, with_audio = f"teachers.{name}" if name else "teacher", name in config.audio_teachers
            check_teacher(each.checkpoint, prompts, config.model.checkpoint, f"{key}.checkpoint", with_audio=with_audio)
    given = GivenResponses(prompts, config.rollout.max_new_tokens)
    limits = given.limits(prompts.limits_for(config.objective.views), config.objective.given_fields)
    data = TrainingData(config, limits, before, main=main)
    held_out = open_evaluation(config.data, prompts.limits)
    sets = {name: load_set(given) for name, given in config.evaluation.sets.items()}
    described = describe(config, start, data.record)
    progress = data.state(replace(before, made_with=described.made_with))
    training = build_training(config, layout, start, checkpoints, described.rates, prompts.pad_id)
    source = build_rollout(config, layout, progress, prompts, data.row, training.step)
    sets |= {HELDOUT: shard_questions(held_out, config.evaluation.samples)}
    evaluator = Evaluator(config.evaluation, sets, prompts, directory, writes=main)
    evaluator.prepare()
    guards = Guards(
        config.evaluation,
        {name: chosen.questions for name, chosen in sets.items()},
        directory,
        progress.made_with.begun,
        None if start.begins else progress.step,
        settings=settings_fingerprint(described.made_with.settings),
        ended=guard_ending(directory) if main else None,
    )
    # What steps after the resumed one have left in dump and metrics is dropped, unless the run stays at its end.
    last = progress.step if guards.ended is None else int(guards.ended["step"])
    rollouts = None if config.record.rollouts is None else directory / config.record.rollouts
    dump = RolloutDump(rollouts, prompts, last, stream_of=config.objective.stream_of, enabled=main)
    log = MetricsLog(
        directory,
        config.train.steps,
        last,
        config.metrics,
        config.alerts,
        evaluations=past_evaluations(directory, progress.step) if main else (),
        settings=to_dict(config),
        enabled=main,
    )
    exports = Exports(directory, checkpoints, config.checkpoint.export_interval, config.checkpoint.export_keep)
    average = training.step.teacher.average
    return Parts(
        config=config,
        layout=layout,
        directory=directory,
        start=start,
        progress=progress,
        changes=described.changes,
        data=data,
        training=training,
        source=source,
        dump=dump,
        log=log,
        evaluations=Evaluations(config, evaluator, log, start, guards, described.made_with.model, writes=main),
        saving=Saving(checkpoints, exports, training.model, training.optimizer, average, layout, progress.step),
        budget=budget,
        stop=StopRequest("the step is finished and saved"),
        watchdog=Watchdog(config.train.watchdog_seconds, directory / "stacks", layout.rank),
        profiler=profiler,
    )


def _refuse_judged(config: RunConfig) -> None:
    if judged := judged_sets(config.evaluation.sets):
        name, given = next(iter(judged.items()))
        raise CordError(
            f"evaluation.sets.{name} (format {given.format}) is scored by a judge, which a training run does not "
            "ask; leave it out here, and evaluate it with cord evaluate"
        )
