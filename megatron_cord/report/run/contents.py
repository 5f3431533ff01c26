"""The contents of a run's directory, which ``reading`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The answers to one held-out question, from its text and from its audio.

    Attributes:
        id: the sample's id in the shards.
        question: its text.
        gold: the right final answer; None if unknown.
        voice: of the recording; None if unknown.
        text_response: the answer to the text.
        text_correct: whether its final answer is right.
        audio_response: the answer to the audio.
        audio_correct: whether its final answer is right.
        tokens: the audio response, token by token; may be empty.
        token_kl: divergence from the text-conditioned teacher at each token, nats; None if not measured.
    """

    id: str
    question: str
    gold: str | None
    voice: str | None
    text_response: str
    text_correct: bool
    audio_response: str
    audio_correct: bool
    tokens: tuple[str, ...]
    token_kl: tuple[float, ...] | None


@dataclass(frozen=True)
class VoiceAccuracy:
    """Accuracies over the ``samples`` questions of one voice."""

    samples: int
    text_accuracy: float
    audio_accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the held-out set: accuracies are shares in [0, 1] of ``samples`` questions."""

    step: int
    text_accuracy: float
    audio_accuracy: float
    samples: int
    seconds: float | None
    voices: Mapping[str, VoiceAccuracy]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class TrainingRollout:
    """One response that was sampled for training; its fields are columns of the rollout dump (``rollout_file``).

    Divergences and weights (one a token; NaN: not measured), reward and reference answer are None where the role does
    not need them.
    """

    step: int
    id: str
    role: str
    question: str
    voice: str | None
    response: str
    finish_reason: str
    tokens: Sequence[str]
    token_kl: Sequence[float] | None
    token_weights: Sequence[float] | None
    reference_answer: str | None
    reward: float | None
    advantage: float
    zero_variance: bool


@dataclass(frozen=True)
class RaisedAlert:
    """One line of ``alerts.jsonl``: an alert that began to hold at a step, in words."""

    step: int
    kind: str
    words: str


@dataclass(frozen=True)
class RunContents:
    """A run's directory, read.

    Attributes:
        path: the directory.
        config: ``config.yaml`` as plain nested maps.
        config_text: the same file as text.
        metrics: one map a step, ascending; a value is None where it was not measured.
        alerts: in the order of the steps.
        evaluations: ascending by step.
        rollout_files: the file of each dumped step, ascending.
        summary: of a finished run; empty before.
        changes: of the settings, in words, in the order of the starts.
        best: step, set, metric and value of the best evaluation, as the summary or `checkpoints/best.json` has it;
            empty where there is none.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: str
    metrics: tuple[Mapping[str, float | None], ...]
    alerts: tuple[RaisedAlert, ...]
    evaluations: tuple[Evaluation, ...]
    rollout_files: Mapping[int, Path]
    summary: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    best: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def last_step(self) -> int:
        """The last step with a metric or an evaluation; 0 before the first."""
        steps = [int(row["step"] or 0) for row in self.metrics] + [evaluation.step for evaluation in self.evaluations]
        return max(steps, default=0)

    @cached_property
    def guard(self) -> Mapping[str, Any] | None:
        """What ended the run, where a guard did: its name, the step, and the step that it went back to or None."""
        found = self.summary.get("guard")
        return found if isinstance(found, Mapping) and {"name", "step", "restored"} <= found.keys() else None

    @cached_property
    def outcome(self) -> Evaluation | None:
        """The evaluation of the weights that the run has: the newest, or that of the step that it went back to."""
        last = self.guard["restored"] if self.guard is not None else None
        return next((each for each in reversed(self.evaluations) if last is None or each.step <= last), None)

    def setting(self, path: str) -> Any:
        """Return the value of ``a.b`` in the configuration; None if it is not there."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value
