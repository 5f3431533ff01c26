"""What a step rolls out, for each objective, and what it makes of the answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig
from megatron_cord.reward import Rewards
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.trainer.collection import (
    Collected,
    Collector,
    RolloutConfig,
    collection_metrics,
    draw_seed,
    repetition,
)
from megatron_cord.trainer.reference_answers import TeacherAnswers
from megatron_cord.trainer.step.objective import ObjectiveConfig
from tests.tiny_run import NUMBERS, make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(4)
ROLLOUT = RolloutConfig(prompts_per_step=4, policy_prompts_per_step=2, policy_rollouts=3, max_new_tokens=8)


def says(request: GenerationRequest) -> str:
    """Reading: one. Hearing: the first sample's rollouts differ, the others' are all two."""
    if not request.prompt.clips:
        return "answer is one"
    return f"answer is {NUMBERS[request.seed % 2 if request.prompt.sample_id == SAMPLES[0].id else 1]}"


def make_collector(
    prompts: PromptBuilder, path: Path, seed: int = 0, rollout: RolloutConfig = ROLLOUT, **objective: Any
) -> Collector:
    engine = ScriptedEngine(prompts, says)
    answers = TeacherAnswers("live", engine, prompts, 8, path / "answers.jsonl")
    return Collector(rollout, ObjectiveConfig(**objective), prompts, answers, Rewards(), seed)


def collect(collector: Collector, samples: list[Any], step: int) -> list[Collected]:
    """What a step makes of the engine's answers."""
    return collector.collect(samples, engine_of(collector).generate(collector.requests(samples, step)), step)


def engine_of(collector: Collector) -> ScriptedEngine:
    engine = collector.answers.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


def drawn(collector: Collector, step: int, samples: list[Any] = SAMPLES) -> dict[tuple[str, float], list[int]]:
    """Seeds of the step's sampled requests, by sample and temperature."""
    engine = engine_of(collector)
    engine.requests.clear()
    collect(collector, samples, step)
    seeds: dict[tuple[str, float], list[int]] = {}
    for request in engine.requests:
        if request.temperature > 0:
            seeds.setdefault((request.prompt.sample_id, request.temperature), []).append(request.seed)
    return seeds


def test_groups_and_advantages(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rewards against another question's answer, advantages over the wrong group, and zero-variance groups that are trained on."""
    collector = make_collector(prompts, tmp_path)
    collected = collect(collector, SAMPLES, step=3)
    assert [(c.sample.id, c.role) for c in collected] == [(s.id, "distill") for s in SAMPLES] + [
        (s.id, "policy") for s in SAMPLES[:2] for _ in range(3)
    ]
    first, second = collected[4:7], collected[7:]
    rewards = [float("one" in c.rollout.text) for c in first]
    assert len(set(rewards)) == 2, "the test's own seeds must give the first group different rewards"
    assert [c.reward for c in first] == rewards and all(c.has_reward_variance for c in first)
    assert [c.advantage for c in first] == pytest.approx([r - sum(rewards) / 3 for r in rewards])
    assert [(c.reward, c.advantage, c.has_reward_variance) for c in second] == [(0.0, 0.0, False)] * 3
    assert all(c.teacher_answer == "answer is one" for c in collected[4:])
    assert all(c.reward is None and c.teacher_answer is None and c.advantage == 0 for c in collected[:4])
    made = collector.sequences(collected)
    assert [(s.index, s.scored) for s in made] == [(i, True) for i in range(4)] + [(i, False) for i in range(4, 7)]
    assert all((s.teacher is not None) == s.scored and s.student.clips for s in made)
    metrics, cut = collection_metrics(collected, 3), sum(c.rollout.finish_reason == "length" for c in collected)
    always = {"truncated": cut / 10, "repetition": 0.0}
    assert metrics == always | {"reward": pytest.approx(sum(rewards) / 6), "groups": 2, "zero_variance_groups": 1}
    assert set(collection_metrics(collected[:4], 3)) == set(always)


def test_repetition() -> None:
    """Catches a loop that counts as text, plain text that counts as a loop, and short answers that alarm."""
    loop, plain = [1, 2, 3] * 20, list(range(60))
    assert repetition(loop) == pytest.approx(1 - 3 / 57) and repetition(plain) == 0
    assert repetition(plain + plain) == pytest.approx(1 - 60 / 117)
    assert repetition([7] * 7) == repetition([]) == 0 < repetition([7] * 8)


def test_seeds_are_those_that_were_asked_with(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a record whose seeds are another step's, another rollout's of the group, or of another order."""
    collector = make_collector(prompts, tmp_path)
    asked = [request.seed for request in collector.requests(SAMPLES, 4) if request.temperature > 0]
    assert [c.seed for c in collect(collector, SAMPLES, step=4)] == asked and len(set(asked)) == 10


def test_temperatures_and_numbers(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches swapped temperatures, a group of the wrong size, and draws that are shared between rollouts."""
    seeds = drawn(make_collector(prompts, tmp_path), step=0)
    assert {key: len(value) for key, value in seeds.items()} == {(s.id, 1.0): 1 for s in SAMPLES} | {
        (s.id, 1.5): 3 for s in SAMPLES[:2]
    }
    assert max(Counter(seed for group in seeds.values() for seed in group).values()) == 1


def test_draws_depend_on_seed_step_and_sample_only(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches draws that a resumed run, another batch around the sample or another layout would not repeat."""
    collector = make_collector(prompts, tmp_path)
    before = drawn(collector, step=5)
    drawn(collector, step=6)
    assert drawn(collector, step=5) == before == drawn(make_collector(prompts, tmp_path), step=5)
    alone = drawn(collector, step=5, samples=SAMPLES[1:2])
    assert (
        alone[SAMPLES[1].id, 1.0] == before[SAMPLES[1].id, 1.0]
        and alone[SAMPLES[1].id, 1.5] == before[SAMPLES[1].id, 1.5]
    )
    for other in (drawn(collector, step=6), drawn(make_collector(prompts, tmp_path, seed=1), step=5)):
        assert not {s for group in other.values() for s in group} & {s for group in before.values() for s in group}
    assert draw_seed(1, 23) != draw_seed(12, 3) and 0 <= draw_seed("x") < 2**48


def test_shared_responses(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches share=true that still samples for L_tok, or leaves responses of zero-variance groups out of it."""
    rollout = RolloutConfig(
        prompts_per_step=4, policy_prompts_per_step=2, policy_rollouts=3, max_new_tokens=8, share=True
    )
    collector = make_collector(prompts, tmp_path, rollout=rollout)
    collected = collect(collector, SAMPLES, step=3)
    assert [c.role for c in collected] == ["shared"] * 6
    made = collector.sequences(collected)
    assert len(made) == 6 and all(s.scored and s.teacher is not None for s in made)
    assert [s.advantage != 0 for s in made] == [True] * 3 + [False] * 3


def test_off_policy_takes_the_teachers_answers(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches fine-tuning on the student's own responses, or on answers to what was heard."""
    collector = make_collector(
        prompts,
        tmp_path,
        responses="teacher",
        policy_gradient=PolicyGradientConfig(enabled=False),
        divergence=DivergenceConfig("nll"),
    )
    collected = collect(collector, SAMPLES, step=0)
    assert [(c.role, c.rollout.text) for c in collected] == [("distill", "answer is one")] * 4
    assert drawn(collector, step=0) == {}
    made = collector.sequences(collected)
    assert all(s.scored and s.teacher is None and s.student.clips for s in made)


def test_switches_that_need_fewer_rollouts(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rollouts that nobody uses: of L_seq without a policy gradient, of L_tok without a divergence."""
    assert set(
        drawn(make_collector(prompts, tmp_path, policy_gradient=PolicyGradientConfig(enabled=False)), step=0)
    ) == {(s.id, 1.0) for s in SAMPLES}
    assert set(drawn(make_collector(prompts, tmp_path, divergence=DivergenceConfig("none")), step=0)) == {
        (s.id, 1.5) for s in SAMPLES[:2]
    }


def test_numbers_that_cannot_be() -> None:
    """Catches a group of one, whose variance is always zero, more groups than prompts, and a temperature of zero, which cannot be drawn from."""
    for wrong in (
        {"policy_rollouts": 1},
        {"prompts_per_step": 0},
        {"prompts_per_step": 2, "policy_prompts_per_step": 3},
        {"temperature": 0.0},
    ):
        with pytest.raises(CordError):
            RolloutConfig(**wrong)  # type: ignore[arg-type]
