"""What a training run adds to an evaluation: divergences of some answers, and the summary."""

from __future__ import annotations

import math

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.evaluation.answers import AudioResponse
from megatron_cord.rollout.types import GenerationRequest, TokenResults
from megatron_cord.trainer.evaluation import measure_divergence, summarize
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from tests.tiny_run import make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(2)


def test_divergences(prompts: PromptBuilder) -> None:
    """Catches divergences beside another sample's answer, NaN in JSON, and an engine that is not compared."""
    asked: list[TrainingSequence] = []

    def score(sequences: list[TrainingSequence]) -> dict[int, TokenResults]:
        asked.extend(sequences)
        return {
            s.index: TokenResults([float(s.index), math.nan], None, [p - 0.25 for p in s.rollout.logprobs])
            for s in reversed(sequences)
        }

    engine = ScriptedEngine(prompts, lambda request: "answer is one")
    spoken, written = [prompts.audio_prompt(s) for s in SAMPLES], [prompts.text_prompt(s) for s in SAMPLES]
    rollouts = engine.generate([GenerationRequest(prompt, 0.0, 8) for prompt in spoken])
    responses = [AudioResponse(*parts) for parts in zip(spoken, written, rollouts, strict=True)]
    measured = measure_divergence(score, 0, responses)
    assert list(measured.token_kl) == [[0.0, None], [1.0, None]]
    assert measured.metrics["engine_logprob_difference"] == measured.metrics["engine_logprob_difference_max"] == 0.25
    for sequence, sample in zip(asked, SAMPLES, strict=True):
        assert sequence.student.clips and sequence.teacher is not None and not sequence.teacher.clips
        assert sequence.rollout.prompt_id == sequence.student.sample_id == sample.id


def test_the_gap_is_measured_from_the_text_before() -> None:
    """Catches a gap that closes because text accuracy fell."""
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
