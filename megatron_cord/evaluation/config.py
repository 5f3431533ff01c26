"""The configuration of evaluations: when a training run evaluates, and which question sets `evaluate` adds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.data.samples import HEAR, READ, PromptDefaults
from megatron_cord.errors import CordError

Format = Literal[
    "shards", "plain", "gsm8k", "mmau", "big_bench_audio", "mmsu", "mmar", "voicebench",
    "voicebench/alpacaeval", "voicebench/alpacaeval_full", "voicebench/commoneval", "voicebench/wildvoice",
    "voicebench/openbookqa", "voicebench/mmsu", "voicebench/sd-qa", "voicebench/ifeval", "voicebench/bbh",
    "voicebench/advbench",
]  # fmt: skip

_NAME = r"[A-Za-z0-9_+-]{1,60}"
HELDOUT = "heldout"  #: the name of the set that data.evaluation makes


@dataclass(frozen=True)
class SetConfig:
    """One set of questions."""

    path: str  #: a file, a directory of shards, of Parquet files, or saved by `datasets`, or hf://OWNER/NAME[@REVISION]
    format: Format = "plain"  #: how its rows are laid out
    audio_root: str | None = None  #: the folder that paths of recordings start from; null: the file's own
    samples: int = 0  #: how many questions, from the beginning; 0 takes all
    system: str | None = None  #: the system prompt of questions without one
    instruction: str | None = None  #: text after the recording, or its transcript, of questions without one
    subset: str | None = None  #: of a set on the hub that has several
    split: str | None = None  #: of a set on the hub that has several
    ignore: tuple[str, ...] = ()  #: fields of its rows to leave aside; others that nothing uses are refused

    @property
    def defaults(self) -> PromptDefaults:
        """System prompt and instruction of questions that lack them."""
        return PromptDefaults(self.system, self.instruction)

    def __post_init__(self) -> None:
        self.defaults  # noqa: B018  (refuses empty texts)
        if self.format == "shards" and (self.audio_root is not None or self.ignore):
            raise CordError("audio_root and ignore are of no use to a set of format shards; remove them")
        if not self.path.startswith("hf://") and (self.subset is not None or self.split is not None):
            raise CordError(f"subset and split choose from a set on the hub (hf://OWNER/NAME); {self.path} is none")
        if self.samples < 0:
            raise CordError(f"samples cannot be negative, got {self.samples}")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Which of a training run's evaluations is the best one, and when evaluations that are no better end the run.

    The evaluation before the first step does not count. `checkpoint.best` keeps the checkpoint of the best one.
    """

    set: str = HELDOUT  #: the set that counts: heldout is data.evaluation, others are those of evaluation.sets
    #: the value that counts: accuracies are the better the higher, the gap between text and audio the lower
    metric: Literal["audio_accuracy", "text_accuracy", "gap"] = "audio_accuracy"
    #: so many evaluations in a row that are no better end the run, as if train.steps were made; 0 never does
    patience: int = 0
    min_delta: float = 0.0  #: a value that is better by no more than this is taken for no better

    def __post_init__(self) -> None:
        if self.patience < 0 or self.min_delta < 0:
            raise CordError(
                "evaluation.early_stopping.patience and evaluation.early_stopping.min_delta cannot be negative"
            )


@dataclass(frozen=True)
class GuardConfig:
    """An accuracy that training must not cost: what is measured, how far it may drop, and what happens beyond."""

    set: str  #: the questions: heldout is data.evaluation, others are those of evaluation.sets
    max_drop: float  #: the largest drop since the baseline, as a share of the questions: 0.02 are two points
    view: Literal["read", "hear"] = "read"  #: answered from their texts or from their recordings
    #: what has to exceed max_drop. low: the lower bound of the drop's 95 % interval, so that chance alone does not end
    #: a run; drop: the drop itself; high: the upper bound, so that a run goes on only while a larger drop is excluded
    decides: Literal["low", "drop", "high"] = "low"
    #: warn; or stop: end the run as its last step would; or restore: the same, from the last checkpoint at which all
    #: guards held (later ones are set aside)
    action: Literal["warn", "stop", "restore"] = "warn"
    patience: int = 1  #: so many evaluations in a row beyond max_drop make a run stop or restore; each one warns
    #: the result to compare with: a SET.json, or the directory that holds it; null: the run's own first evaluation
    baseline: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < 1.0:
            raise CordError(f"max_drop is a share of the questions, at least 0 and below 1, got {self.max_drop:g}")
        if self.patience < 1:
            raise CordError(f"patience must be at least 1, got {self.patience}")

    @property
    def modality(self) -> str:
        """The view's name in results: text or audio."""
        return {READ: "text", HEAR: "audio"}[self.view]


@dataclass(frozen=True)
class EvaluationConfig:
    """When to evaluate, on which questions, and how answers are scored."""

    #: steps between evaluations of a training run, which has one before the first and after the last step too; 0: those
    #: two alone
    interval: int = 50
    #: a run's directory: the evaluation before this run's first step is not made but taken from that run, which began
    #: with the same model and has the same questions; null: it is made
    first_from: str | None = None
    samples: int = 0  #: of data.evaluation, from its beginning; 0 takes all
    max_new_tokens: int = 200  #: the length at which answers are cut
    scored: int = 48  #: answers whose divergence from the teacher is computed token by token, for the report
    #: for `evaluate`: latest or best (of output_dir), base (model.checkpoint), or a checkpoint's directory
    checkpoint: str = "latest"
    #: when a run ends because its evaluations get no better
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    #: question sets by name, beside data.evaluation: for `evaluate`, and for the evaluations of a training run
    sets: dict[str, SetConfig] = field(default_factory=dict)
    #: what a training run may not cost, by name: each watches an accuracy on one of the sets; `evaluate` compares, too
    #: (docs/evaluation.md)
    guards: dict[str, GuardConfig] = field(default_factory=dict)
    #: for `evaluate`: what to compare with: base, which is then evaluated too, or another evaluation's directory
    baseline: str | None = None
    #: for `evaluate`: what compares free answers with gold ones: rules, or the model of reward.judge
    comparer: Literal["match", "judge"] = "match"
    chunk: int = 64  #: for `evaluate`: questions generated together, whose answers are then written to disk
    #: for `evaluate`: questions of each set that results.html can play, the most telling first; 8 MB of recordings at
    #: most, which are inside the page; 0: none
    players: int = 20
    max_rejects: float = 0.02  #: the largest share of a set that may be left out because no prompt can be made of it

    def __post_init__(self) -> None:
        if min(self.interval, self.samples, self.scored, self.players) < 0:
            raise CordError("evaluation.interval, samples, scored and players cannot be negative")
        if self.chunk < 1 or self.max_new_tokens < 1 or not 0.0 <= self.max_rejects <= 1.0:
            raise CordError(
                "evaluation.chunk and max_new_tokens must be at least 1, and max_rejects a share between 0 and 1"
            )
        known = (HELDOUT, *self.sets)
        if self.early_stopping.set not in known:
            raise CordError(
                f"evaluation.early_stopping.set={self.early_stopping.set} is none of the run's sets: {', '.join(known)}"
            )
        if self.early_stopping.patience and not self.interval:
            raise CordError("evaluation.early_stopping.patience needs evaluations: set evaluation.interval above 0")
        for name, guard in self.guards.items():
            if not re.fullmatch(_NAME, name):
                raise CordError(
                    f"evaluation.guards: {name!r} becomes a metric's name; use letters, digits, '_', '+' and '-'"
                )
            if guard.set not in known:
                raise CordError(
                    f"evaluation.guards.{name}.set={guard.set} is none of the run's sets: {', '.join(known)}"
                )
        for name in self.sets:
            if not re.fullmatch(_NAME, name):
                raise CordError(
                    f"evaluation.sets: {name!r} becomes a file's name; use letters, digits, '_', '+' and '-'"
                )
            if name in (HELDOUT, "results"):
                raise CordError(f"evaluation.sets: the name {name!r} is taken; choose another")
