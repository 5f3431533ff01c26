"""The configuration of a run: one section a component, each declared beside the component itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from megatron_cord.config.loading import load_config
from megatron_cord.data.config import DataConfig, TrainingSetConfig
from megatron_cord.data.samples import HEAR, READ
from megatron_cord.data.shards.manifest import is_remote
from megatron_cord.data.views import View, ViewConfig, Views, check_student
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EvaluationConfig
from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.reward import RewardConfig
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.trainer.alignment.checks import check_alignment
from megatron_cord.trainer.checkpoint.checkpoints import CheckpointConfig
from megatron_cord.trainer.observability.alerts import AlertConfig
from megatron_cord.trainer.observability.profiler import ProfileConfig
from megatron_cord.trainer.observability.rollout_dump import RecordConfig
from megatron_cord.trainer.observability.trackers.config import MetricsConfig
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.teacher import TeacherConfig
from megatron_cord.trainer.teachers import audio_teachers, check_teachers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How long the run is, and how sequences are put into microbatches."""

    steps: int = 3000  #: each trains on rollout.prompts_per_step prompts; the paper's value
    #: the run ends before so many hours are over, all its starts together, with its last checkpoint and evaluation in
    #: time, and counts as finished; whichever of steps and hours is first. Learning rates follow steps alone. 0: no end
    hours: float = 0.0
    #: a step's samples are split into so many mini-batches, each of which makes an optimizer update; 1 is the paper's
    minibatches: int = 1
    passes: int = 1  #: a step goes over its mini-batches so often
    packing: Literal["padded", "packed"] = "padded"  #: sequences padded to the longest, or one after the other
    micro_batch_size: int = 4  #: padded: sequences that go through the model together
    #: packed: tokens that do, student's and teacher's each; a longer sequence goes alone
    tokens_per_microbatch: int = 8192
    max_skipped_in_a_row: int = 5  #: so many steps without a finite loss stop the run
    #: a longer phase of a step (each round of sampling and each update is one) is taken for a hang: the rank writes its
    #: stacks and ends; 0 waits on
    watchdog_seconds: float = 480.0
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.max_skipped_in_a_row < 1:
            raise CordError("train.steps and train.max_skipped_in_a_row must be at least 1")
        if self.minibatches < 1 or self.passes < 1:
            raise CordError("train.minibatches and train.passes must be at least 1")
        if self.micro_batch_size < 1 or self.tokens_per_microbatch < 1:
            raise CordError("train.micro_batch_size and train.tokens_per_microbatch must be at least 1")
        if self.hours < 0:
            raise CordError(f"train.hours cannot be negative, got {self.hours:g}; 0 sets no end")
        if self.watchdog_seconds < 0:
            raise CordError(f"train.watchdog_seconds cannot be negative, got {self.watchdog_seconds}")
        if beyond := [step for step in self.profile.steps if step > self.steps]:
            raise CordError(f"train.profile.steps names step {beyond[0]}, and train.steps={self.steps} is the last")


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run."""

    EXPLAINED_BY: ClassVar[str] = "cord config"

    output_dir: str  #: metrics, rollout dump, checkpoints and evaluations go there
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    #: views of samples by name, beside the built-in hear and read (docs/data.md)
    views: dict[str, ViewConfig] = field(default_factory=dict)
    seed: int = 0  #: of data order, sampling and everything else that is drawn
    #: Where output_dir holds a checkpoint, the run goes on with its newest; resume and init_from say what happens where
    #: it holds none. auto: the run begins; never: the same, and a checkpoint in output_dir is an error; or a directory,
    #: of a checkpoint or of a run: its training goes on here, from its step and with its optimizer
    resume: str = "auto"
    #: a new run begins with these weights in place of model.checkpoint's: a checkpoint, a run, or a Hugging Face
    #: directory. The frozen teacher stays model.checkpoint
    init_from: str | None = None
    init_optimizer: bool = False  #: take the optimizer's moments from init_from, too; it must be a run's checkpoint
    replay: str | None = None  #: a rollout dump to train from, without an engine
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    #: further teachers by name, each a checkpoint or a mode, for streams and training sets that name one (taught_by)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    alerts: AlertConfig = field(default_factory=AlertConfig)

    def __post_init__(self) -> None:
        if self.train.watchdog_seconds >= 60 * self.parallel.timeout_minutes:
            raise CordError(
                f"train.watchdog_seconds={self.train.watchdog_seconds:g} must be shorter than parallel.timeout_minutes="
                f"{self.parallel.timeout_minutes:g}: else ranks that wait for a stuck one end before it can say "
                "where it is"
            )
        if self.rollout.engine == "sglang" and 0 < self.train.watchdog_seconds <= self.rollout.sglang.start_seconds:
            raise CordError(
                f"rollout.sglang.start_seconds={self.rollout.sglang.start_seconds:g} must be shorter than "
                "train.watchdog_seconds="
                f"{self.train.watchdog_seconds:g}: else ranks that wait for servers are taken for stuck"
            )
        copied = any(is_remote(each.path) for each in self.data.training_sets.values()) if self.data.train else False
        if copied and 0 < self.train.watchdog_seconds <= self.data.fetch_seconds:
            raise CordError(
                f"data.fetch_seconds={self.data.fetch_seconds:g} must be shorter than train.watchdog_seconds="
                f"{self.train.watchdog_seconds:g}: else ranks that wait for a shard are taken for stuck"
            )
        self._check_views()
        check_teachers(self.teachers, self.objective, self._named_sets)
        check_alignment(self.objective, self.reward)
        if self.objective.verifies(self.reward.terms) and not self.reward.judge.is_given:
            raise CordError(
                "the reward has reasoning, about which a language model decides; set reward.judge.base_url and "
                "reward.judge.model"
            )
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise CordError(
                f"init_from={self.init_from} begins a run and resume={self.resume} continues one; give one of them"
            )
        if self.rollout.router_replay and (self.replay is not None or self.objective.responses == "teacher"):
            reason = "a rollout dump has none" if self.replay is not None else "objective.responses=teacher has none"
            raise CordError(
                "rollout.router_replay follows the experts that an engine chose for the student's responses, and "
                f"{reason}; set it to false"
            )
        if self.model.lora.enabled and self.optimizer.kind == "muon":
            raise CordError(
                "optimizer.kind=muon makes whole matrices orthogonal, and model.lora trains factors of them; set "
                "optimizer.kind=adam"
            )
        if self.init_optimizer and self.init_from is None:
            raise CordError("init_optimizer=true needs init_from, the run whose optimizer it is")
        if self.checkpoint.best and not self.evaluation.interval:
            raise CordError("checkpoint.best=true needs evaluations to choose by: set evaluation.interval above 0")
        answers = self.objective.responses == "teacher" or (
            self.rollout.policy_prompts_per_step > 0 and self.objective.compares(self.reward.terms)
        )
        own_teacher = self.teacher.checkpoint is not None and self.replay is None
        if own_teacher and answers and self.rollout.engine == "sglang" and not self.teacher.servers:
            raise CordError(
                "teacher.checkpoint gives the reference answers, and the servers of rollout.sglang run the student: "
                "start servers of that checkpoint and name them in teacher.servers"
            )
        groups = self.rollout.policy_prompts_per_step if self.objective.policy_gradient.enabled else 0
        fewest = min(groups or self.rollout.prompts_per_step, self.rollout.prompts_per_step)
        if self.train.minibatches > fewest:
            raise CordError(
                f"train.minibatches={self.train.minibatches} is more than the {fewest} prompts that a step has for "
                f"{'L_seq (rollout.policy_prompts_per_step)' if groups else 'L_tok (rollout.prompts_per_step)'}: some "
                "update would have nothing to train on"
            )
        grouped = [term.name for term in self.objective.policy_terms if term.name]
        if grouped and not groups:
            raise CordError(
                f"objective.streams.{grouped[0]} is of the kind policy_gradient, and rollout.policy_prompts_per_step=0 "
                "gives it no prompts; set it to at least 1"
            )
        if len(grouped) > 1 and self.rollout.dynamic_sampling:
            raise CordError(
                "rollout.dynamic_sampling replaces a prompt's group, and several streams of the kind policy_gradient "
                f"have one each ({', '.join(grouped)}), which would have to be replaced together; set it to 0"
            )
        if self.objective.streams and self.rollout.share:
            raise CordError(
                "rollout.share=true has L_seq's responses stand for L_tok's, and objective.streams have their own"
            )
        if self.rollout.dynamic_sampling and not groups:
            raise CordError(
                "rollout.dynamic_sampling needs objective.policy_gradient.enabled=true and "
                "rollout.policy_prompts_per_step above 0: it replaces groups of L_seq"
            )
        if (
            self.teacher.mode == "ema"
            and "" in self.audio_teachers
            and {*self.model.trained_parts} - {"language_model"}
        ):
            raise CordError(
                "teacher.mode=ema averages the language model alone, and the teacher's view has audio, whose encoder "
                "or adapter is trained, too: name both in model.freeze, or use frozen or live"
            )
        if self.teacher.mode == "ema" and self.objective.responses == "teacher":
            raise CordError(
                "objective.responses=teacher needs answers that teacher.mode=ema cannot generate; use frozen or live"
            )

    def _check_views(self) -> None:
        views, objective = Views(self.views), self.objective
        given = {"objective.student_view": objective.student_view}
        for policy in objective.policy_terms:
            if policy.name:
                given[f"objective.streams.{policy.name}.student"] = policy.student
        for term in (term for term in objective.terms if term.name):
            given |= {f"objective.streams.{term.name}.{k}": getattr(term, k) for k in ("student", "rollout")}
            views.named(term.teacher, f"objective.streams.{term.name}.teacher")
            if term.contrast is not None:
                views.named(term.contrast.view, f"objective.streams.{term.name}.contrast.view")
        views.named(objective.teacher_view, "objective.teacher_view")
        for key, name in given.items():
            self._check_student(views.named(name, key), key)
        for name, each in self._named_sets.items():
            for stands, other in each.views.items():
                key = f"data.train.{name}.views.{stands}"
                if stands in (HEAR, READ):
                    raise CordError(
                        f"{key}: {stands} is the same in all sets, as reference answers are made of it; "
                        "make a view of its own for the objective, for which others may stand"
                    )
                if stands not in objective.views:
                    raise CordError(f"{key}: the objective has the views {', '.join(objective.views)}")
                view = views.named(other, key)
                if stands in given.values():
                    self._check_student(view, key)

    def _check_student(self, view: View, key: str) -> None:
        """Refuse a view that the student cannot be given, or on which nothing of it can be trained."""
        check_student(view, key)
        if "audio" in view.parts:
            return
        if "language_model" in self.model.freeze and not self.model.lora.enabled:
            raise CordError(
                f"{key}={view.name} has no audio, and model.freeze keeps the language model: nothing could be "
                "trained on it; leave the language model out of model.freeze, or choose a view with audio"
            )
        if self.optimizer.overlap_communication:
            raise CordError(
                f"{key}={view.name} has no audio, so the encoder gets no gradient, which "
                "optimizer.overlap_communication=true would wait for; set it to false"
            )

    @property
    def audio_teachers(self) -> frozenset[str]:
        """The names of the teachers that score on a view with audio; the run's own is called ""."""
        return audio_teachers(self.objective, self._named_sets, Views(self.views))

    @property
    def _named_sets(self) -> dict[str, TrainingSetConfig]:
        return self.data.train if isinstance(self.data.train, dict) else {}

    @property
    def equal_views(self) -> tuple[str, ...]:
        """The views on which student and teacher are compared with each other as they are."""
        if any(each.taught_by is not None for each in self._named_sets.values()):
            return ()  # other models than the student may score there
        terms = (t for t in self.objective.terms if t.distils and t.contrast is None and t.taught_by is None)
        compared = ((term.student, term.teacher) for term in terms)
        return tuple(one for one, other in compared if self.views.get(one, one) == self.views.get(other, other))


def load_run_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a run's configuration; a run whose directory was moved goes on where its `config.yaml` lies now.

    Raises:
        CordError: anything is wrong in it.
    """
    config = load_config(RunConfig, path, overrides)
    place = path.parent
    is_run = path.name == "config.yaml" and any((place / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    chosen = any(override.partition("=")[0].strip() == "output_dir" for override in overrides)
    if not is_run or chosen or place.resolve() == Path(config.output_dir).resolve():
        return config
    logger.info(
        "%s names output_dir=%s, but lies in %s: the run was moved or copied, and goes on in %s (give output_dir=… for "
        "another place)",
        path,
        config.output_dir,
        place,
        place,
    )
    return replace(config, output_dir=str(place))
