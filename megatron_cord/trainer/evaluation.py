"""Accuracy reading and hearing on held-out questions, with any engine: the gap that CORD closes."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.errors import CordError
from megatron_cord.evaluation.formats import SetConfig
from megatron_cord.evaluation.scoring import is_correct
from megatron_cord.evaluation.statistics import gap_closed
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine
from megatron_cord.trainer.observability.logprob_mismatch import agreement_metrics
from megatron_cord.trainer.observability.metrics import json_floats
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.step import TokenRecord

Scorer = Callable[[list[TrainingSequence]], list[TokenRecord]]


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on how much."""

    interval: int = 50  #: steps between evaluations; before the first and after the last step there is always one; 0 leaves it at those
    samples: int = 0  #: of data.evaluation, from its beginning; 0 takes all
    max_new_tokens: int = 200  #: answers are cut there
    scored: int = 48  #: answers whose divergence from the teacher is computed token by token, for the report
    checkpoint: str = (
        "latest"  #: for `evaluate`: latest (of output_dir), base (model.checkpoint), or a checkpoint's directory
    )
    sets: dict[str, SetConfig] = field(
        default_factory=dict
    )  #: for `evaluate`: question sets by name, beside data.evaluation
    baseline: str | None = (
        None  #: what those results are compared with: base, which is then evaluated too, or the directory of another evaluation
    )
    comparer: Literal["match", "judge"] = "match"  #: who compares free answers with gold ones: rules, or reward.judge
    chunk: int = 64  #: questions that are asked together, and whose answers are then written down
    max_rejects: float = 0.02  #: the largest share of a set's questions that may turn out not to be askable

    def __post_init__(self) -> None:
        if min(self.interval, self.samples, self.scored) < 0:
            raise CordError("evaluation.interval, evaluation.samples and evaluation.scored cannot be negative")
        if self.chunk < 1 or self.max_new_tokens < 1 or not 0.0 <= self.max_rejects <= 1.0:
            raise CordError(
                "evaluation.chunk and max_new_tokens must be at least 1, and max_rejects a share between 0 and 1"
            )
        for name in self.sets:
            if not re.fullmatch(r"[A-Za-z0-9_+-]{1,60}", name):
                raise CordError(
                    f"evaluation.sets: {name!r} becomes a file's name; use letters, digits, '_', '+' and '-'"
                )


class Evaluator:
    """Answers every held-out question twice, greedily: from its text and from its audio. All ranks call it alike.

    Args:
        config: how much.
        samples: held-out questions with gold answers.
        prompts: builds both prompts.
        engine: generates.

    Raises:
        CordError: a sample without a gold answer.
    """

    def __init__(
        self, config: EvaluationConfig, samples: Sequence[Sample], prompts: PromptBuilder, engine: RolloutEngine
    ) -> None:
        self.config, self.engine, self.prompts = config, engine, prompts
        self.samples = list(samples)
        for sample in self.samples:
            if sample.answer is None:
                raise CordError(f"sample {sample.id} of data.evaluation has no answer; evaluation needs one")
        self._spoken = [prompts.audio_prompt(s) for s in self.samples]
        self._written = [prompts.text_prompt(s) for s in self.samples]

    def run(self, step: int, score: Scorer | None = None) -> dict[str, Any]:
        """Evaluates the engine's current weights.

        Args:
            step: of the weights.
            score: computes divergences of the first `config.scored` spoken answers; None leaves them out.

        Returns:
            accuracies, their gap, accuracies by voice, how far trainer and engine agree on the scored answers (`agreement_metrics`), and all
            answers, as written to `evaluations/step_….json`.
        """
        begun = time.perf_counter()
        answers = self._answer(self._written + self._spoken)
        text, audio = answers[: len(self.samples)], answers[len(self.samples) :]
        rows = [self._row(s, t, a) for s, t, a in zip(self.samples, text, audio, strict=True)]
        agreement: dict[str, float] = {}
        if score is not None:
            count = min(self.config.scored, len(rows))
            sequences = [
                TrainingSequence(self._spoken[i], self._written[i], audio[i], True, 0.0, i) for i in range(count)
            ]
            tokens = score(sequences)
            agreement = agreement_metrics(tokens, audio, step)
            for token in tokens:
                rows[token.index]["token_kl"] = None if token.kl is None else json_floats(token.kl)
        by_voice: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_voice[row["voice"] or "unknown"].append(row)
        return (
            {"step": step}
            | _accuracies(rows)
            | {name: value for name, value in agreement.items() if math.isfinite(value)}
            | {
                "voices": {voice: _accuracies(group) for voice, group in sorted(by_voice.items())},
                "seconds": time.perf_counter() - begun,
                "answers": rows,
            }
        )

    def _answer(self, prompts: list[Prompt]) -> list[Rollout]:
        return self.engine.generate([GenerationRequest(p, 0.0, self.config.max_new_tokens) for p in prompts])

    def _row(self, sample: Sample, text: Rollout, audio: Rollout) -> dict[str, Any]:
        return {
            "id": sample.id,
            "question": sample.question,
            "answer": sample.answer,
            "voice": sample.voice,
            "text_response": text.text,
            "text_correct": is_correct(sample.answer or "", sample.choices, text.text),
            "audio_response": audio.text,
            "audio_correct": is_correct(sample.answer or "", sample.choices, audio.text),
            "tokens": self.prompts.token_strings(audio.token_ids),
            "token_kl": None,
        }


def _accuracies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    text = sum(r["text_correct"] for r in rows) / len(rows)
    audio = sum(r["audio_correct"] for r in rows) / len(rows)
    return {"samples": len(rows), "text_accuracy": text, "audio_accuracy": audio, "gap": text - audio}


def evaluation_file(directory: Path, step: int) -> Path:
    """Where the evaluation after a step stands in a run's directory."""
    return directory / "evaluations" / f"step_{step:06d}.json"


def past_evaluations(directory: Path, last_step: int) -> list[dict[str, Any]]:
    """The evaluations of a run's directory up to this step, ascending, without their answers; an unreadable one is left out."""
    past = []
    for path in sorted((directory / "evaluations").glob("step_*.json")):
        try:
            result = json.loads(path.read_text())
            row = {name: result[name] for name in ("step", "samples", "text_accuracy", "audio_accuracy")}
        except (ValueError, KeyError, TypeError):
            continue
        if row["step"] <= last_step:
            past.append(row)
    return past


def write_evaluation(directory: Path, result: dict[str, Any]) -> Path:
    """Writes `evaluations/step_….json` in a run's directory, complete or absent."""
    path = evaluation_file(directory, result["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    return path


def summarize(before: dict[str, Any], after: dict[str, Any], *, seconds: float, tp: int, steps: int) -> dict[str, Any]:
    """The run in ten numbers. Gap closed = 1 − (text − audio after) / (text − audio before), text accuracy of the original model."""
    text = before["text_accuracy"]
    gap_before, gap_after = text - before["audio_accuracy"], text - after["audio_accuracy"]
    return {
        "text_accuracy": text,
        "text_accuracy_after": after["text_accuracy"],
        "audio_accuracy_before": before["audio_accuracy"],
        "audio_accuracy_after": after["audio_accuracy"],
        "gap_before": gap_before,
        "gap_after": gap_after,
        "gap_closed": gap_closed(text, before["audio_accuracy"], after["audio_accuracy"]),
        "samples": after["samples"],
        "seconds": seconds,
        "tp": tp,
        "steps": steps,
    }
