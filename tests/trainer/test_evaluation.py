"""Accuracy reading and hearing, counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.trainer.evaluation import EvaluationConfig, Evaluator, evaluation_file, summarize, write_evaluation
from megatron_cord.trainer.step.batches import TrainingSequence
from megatron_cord.trainer.step.step import TokenRecord
from tests.tiny_run import NUMBERS, make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(4)


def answers_well_from_text(request: GenerationRequest) -> str:
    """Right answers to what is read; of what is heard, only the first sample's is right."""
    sample = next(s for s in SAMPLES if s.id == request.prompt.sample_id)
    number = int(sample.answer or 0)
    wrong = bool(request.prompt.clips) and sample is not SAMPLES[0]
    return f"answer is {NUMBERS[number % 4 if wrong else number - 1]}"


def make_evaluator(prompts: PromptBuilder, scored: int = 48) -> Evaluator:
    return Evaluator(EvaluationConfig(scored=scored), SAMPLES, prompts, ScriptedEngine(prompts, answers_well_from_text))


def test_accuracies_and_voices(prompts: PromptBuilder) -> None:
    """Catches reading taken for hearing, accuracies over other samples than the voice's, and sampled answers."""
    evaluator = make_evaluator(prompts)
    result = evaluator.run(7)
    assert (result["step"], result["samples"], result["text_accuracy"], result["audio_accuracy"], result["gap"]) == (
        7,
        4,
        1.0,
        0.25,
        0.75,
    )
    assert [(v["samples"], v["text_accuracy"], v["audio_accuracy"]) for v in result["voices"].values()] == [
        (2, 1.0, 0.5),
        (2, 1.0, 0.0),
    ]
    assert list(result["voices"]) == ["voice0", "voice1"]
    assert [a["audio_correct"] for a in result["answers"]] == [True, False, False, False]
    assert [a["id"] for a in result["answers"]] == [s.id for s in SAMPLES]
    assert all(a["text_correct"] and a["token_kl"] is None for a in result["answers"])
    assert all(r.temperature == 0 for r in evaluator.engine.requests)  # type: ignore[attr-defined]


def test_some_answers_are_scored(prompts: PromptBuilder) -> None:
    """Catches divergences beside another sample's answer, numbers that are none in the file, and an engine that is not compared."""
    asked: list[TrainingSequence] = []

    def score(sequences: list[TrainingSequence]) -> list[TokenRecord]:
        asked.extend(sequences)
        return [
            TokenRecord(s.index, [float(s.index), math.nan], None, [p - 0.25 for p in s.rollout.logprobs])
            for s in reversed(sequences)
        ]

    result = make_evaluator(prompts, scored=2).run(0, score)
    assert [a["token_kl"] for a in result["answers"]] == [[0.0, None], [1.0, None], None, None]
    assert result["engine_logprob_difference"] == result["engine_logprob_difference_max"] == 0.25
    for sequence, sample in zip(asked, SAMPLES[:2], strict=True):
        assert sequence.student.clips and sequence.teacher is not None and not sequence.teacher.clips
        assert sequence.rollout.prompt_id == sequence.student.sample_id == sample.id


def test_the_file_is_whole(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a leftover beside the file, or another name than readers look for."""
    result = make_evaluator(prompts).run(12)
    assert (
        write_evaluation(tmp_path, result)
        == evaluation_file(tmp_path, 12)
        == tmp_path / "evaluations" / "step_000012.json"
    )
    assert json.loads(evaluation_file(tmp_path, 12).read_text()) == result
    assert len(list((tmp_path / "evaluations").iterdir())) == 1


def test_the_gap_is_measured_from_the_text_before() -> None:
    """Catches a gap that closes because reading got worse."""
    before, after = (
        {"text_accuracy": 0.96, "audio_accuracy": 0.56},
        {"text_accuracy": 0.90, "audio_accuracy": 0.86, "samples": 50},
    )
    summary = summarize(before, after, seconds=1.5, tp=2, steps=9)
    assert summary["gap_before"] == pytest.approx(0.4) and summary["gap_after"] == pytest.approx(0.1)
    assert (
        summary["gap_closed"] == pytest.approx(0.75)
        and summary["text_accuracy"] == 0.96
        and summary["text_accuracy_after"] == 0.90
    )
    assert {"audio_accuracy_before", "audio_accuracy_after", "seconds", "tp", "steps"} <= summary.keys()
    assert summarize(before | {"audio_accuracy": 0.96}, after, seconds=0, tp=1, steps=1)["gap_closed"] is None


def test_samples_without_a_gold_answer(prompts: PromptBuilder) -> None:
    """Catches an evaluation that counts them as wrong."""
    unknown = dataclasses.replace(SAMPLES[1], answer=None)
    with pytest.raises(CordError, match=f"sample {unknown.id} of data.evaluation has no answer"):
        Evaluator(EvaluationConfig(), [SAMPLES[0], unknown], prompts, ScriptedEngine(prompts, answers_well_from_text))
