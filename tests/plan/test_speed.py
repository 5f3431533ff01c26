"""Planned operations and seconds of a step: its sequences, passes and rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.plan import GPUS, make_work, memory, part_counts, published, speed
from megatron_cord.plan.speed import RUNNING, train_flops
from tests.plan.small_model import configured


def test_operations_are_those_of_the_products(checkpoint: Path) -> None:
    """Catches a wrong factor: 6 operations a parameter and token of a text model, 2 for the teacher, and attention."""
    arch = replace(published("qwen2_audio_7b"), encoder=None, adapter=None)
    config = configured(
        checkpoint,
        "rollout.max_new_tokens=100",
        "objective.policy_gradient.enabled=false",
        "rollout.prompts_per_step=8",
    )
    work = make_work(config, arch, 8, text_tokens=100)
    flops, again = train_flops(config, arch, work)
    lm = arch.language
    layers = part_counts(arch).language_model - 2 * lm.vocab_size * lm.hidden_size
    student, teacher, output = 8 * 150, 8 * 200, lm.vocab_size * lm.hidden_size * 8 * 100
    attention = lm.num_layers * lm.hidden_size * (2 * 3 * student * 150 + 2 * teacher * 200)
    assert again == 0 and flops == pytest.approx(
        6 * layers * student + 2 * layers * teacher + attention + (6 + 2) * output, rel=1e-3
    )


def test_streams_count_with_the_lengths_of_their_views(checkpoint: Path) -> None:
    """Catches streams that are all taken for the heard prompt, and a second view or a teacher's audio left out."""
    arch = published("qwen2_audio_7b")
    policy = ("objective.policy_gradient.enabled=false", "rollout.prompts_per_step=8", "rollout.max_new_tokens=100")
    streams = "{a: {student: read, responses: 3}, b: {teacher: hear, contrast: {view: read}}}"
    plain, several = (
        make_work(configured(checkpoint, *policy, *more), arch, 8, audio_seconds=10.0, text_tokens=60)
        for more in ((), (f"objective.streams={streams}",))
    )
    heard, read = 250 + 30, 60
    assert (plain.student_tokens, plain.teacher_tokens, plain.clips) == (heard + 100, read + 100, 1)
    assert (several.sequences, several.scored) == (32, 32)
    assert several.student_tokens == (3 * (read + 100) + heard + 100) / 4 and several.clips == 0.25
    assert several.teacher_tokens == (3 * (read + 100) + heard + 100 + read + 100) / 4
    assert several.longest_tokens == plain.student_tokens and several.taught_clips == 0.25


def test_given_responses_are_not_generated(checkpoint: Path) -> None:
    """Catches responses of the data that a plan has the engine generate, and prompts of another view than is answered.

    Also a step of fine-tuning with a rollout that lasts.
    """
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    common = ("objective.policy_gradient.enabled=false", "rollout.prompts_per_step=512", "rollout.max_new_tokens=100")

    def planned(streams: str) -> Any:
        config = configured(checkpoint, *common, f"objective.streams={{{streams}}}")
        work = make_work(config, arch, 8, audio_seconds=10.0, text_tokens=60)
        return work, speed(config, arch, work, gpu, 8, 8)

    given = "b: {source: answer, divergence: {kind: nll}}"
    (alone, fast), (both, mixed), (fine, none) = map(planned, ("a: {}", f"a: {{}}, {given}", given))
    assert (alone.generated, alone.generated_tokens) == (alone.sequences, alone.student_tokens)
    assert (both.sequences, both.generated, fine.generated) == (1024, 512, 0)
    assert mixed.rollout == fast.rollout and none.rollout == (0.0, 0.0)
    assert mixed.train > fast.train > none.train
    elsewhere, _ = planned("a: {rollout: read, responses: 2}, b: {student: read}")
    assert elsewhere.generated_tokens == 60 + 100 < elsewhere.student_tokens


def test_several_updates_and_further_rounds_cost_their_time(checkpoint: Path) -> None:
    """Catches plans of GRPO and DAPO without their passes, minibatches, and rounds of dynamic sampling."""
    arch, gpu = replace(published("qwen2_audio_7b"), encoder=None, adapter=None), GPUS["h100"]
    groups = "rollout={prompts_per_step: 64, policy_prompts_per_step: 24, policy_rollouts: 64}"
    one, four, resampled = (
        configured(checkpoint, groups, "parallel.pp=2", "model.recompute=[audio_encoder,language_model]", *more)
        for more in ((), ("train.minibatches=2", "train.passes=2"), ("rollout.dynamic_sampling=3",))
    )
    works = [make_work(config, arch, 8) for config in (one, four, resampled)]
    (flops, again), (more, more_again), _ = (
        train_flops(config, arch, work) for config, work in zip((one, four, resampled), works, strict=True)
    )
    lm, work = arch.language, works[0]
    output = lm.vocab_size * lm.hidden_size
    layers = part_counts(arch).language_model - 2 * output + lm.num_layers * lm.hidden_size * work.student_tokens
    scoring = 2 * work.sequences * (layers * work.student_tokens + output * work.response_tokens)
    assert more == pytest.approx(2 * flops + scoring, rel=1e-9) and more_again == 2 * again
    assert memory(four, arch, works[1]).teacher_hidden == memory(one, arch, works[0]).teacher_hidden / 2
    assert works[1].microbatches == -(-works[0].microbatches // 2)
    assert works[2].resampled == (24 * 64, 16 * 64)
    plain, longer = (speed(c, arch, w, gpu, 8).rollout for c, w in zip((one, resampled), works[::2], strict=True))
    waves = [-(-count // (8 * RUNNING)) for count in (works[2].sequences, *works[2].resampled)]
    assert longer[0] == pytest.approx(plain[0] * sum(waves) / waves[0]) and longer[1] == plain[1]
