"""What a step rolls out, for each objective, and what it makes of the answers."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier, local
from typing import Any

import pytest

from megatron_cord.data.loader import Batch
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig
from megatron_cord.reward import Rewards
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.types import GenerationRequest, ScoredRollout
from megatron_cord.trainer import dynamic_sampling
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers
from megatron_cord.trainer.collection import Collector, draw_seed
from megatron_cord.trainer.dynamic_sampling import replace_groups
from megatron_cord.trainer.rollout_metrics import repetition, rollout_metrics
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.streams import StreamConfig
from tests.tiny_run import NUMBERS, make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(4)
ROLLOUT = RolloutConfig(prompts_per_step=4, policy_prompts_per_step=2, policy_rollouts=3, max_new_tokens=8)


def says(request: GenerationRequest) -> str:
    """Answer one to the text; to the audio, the first sample's rollouts differ, the others' are all two."""
    if not request.prompt.clips:
        return "answer is one"
    return f"answer is {NUMBERS[request.seed % 2 if request.prompt.sample_id == SAMPLES[0].id else 1]}"


def make_collector(
    prompts: PromptBuilder, path: Path, seed: int = 0, rollout: RolloutConfig = ROLLOUT, **objective: Any
) -> Collector:
    engine = CollectiveEngine(ScriptedEngine(prompts, says))
    answers = ReferenceAnswers("live", lambda: nullcontext(engine), prompts, 8, path / "answers.jsonl")
    return Collector(rollout, ObjectiveConfig(**objective), answers, Rewards(), seed)


def batch_of(collector: Collector, step: int, rank: int = 0, world: int = 1) -> Batch:
    """Return a data-parallel rank's share of the samples."""
    positions = tuple(range(rank, len(SAMPLES), world))
    samples = collector.answers.prompts.prepare([SAMPLES[p] for p in positions], collector.views)
    return Batch(step, positions, tuple(samples))


def score(collector: Collector, batch: Batch) -> list[ScoredRollout]:
    """Return what a batch becomes with the engine's responses."""
    return collector.score(batch, engine_of(collector).generate(collector.requests(batch)))


def engine_of(collector: Collector) -> ScriptedEngine:
    with collector.answers.engine() as collective:
        engine = collective.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


def drawn(collector: Collector, step: int, rank: int = 0, world: int = 1) -> dict[tuple[str, float], list[int]]:
    """Seeds of the step's sampled requests, by sample and temperature."""
    engine = engine_of(collector)
    engine.requests.clear()
    score(collector, batch_of(collector, step, rank, world))
    seeds: dict[tuple[str, float], list[int]] = {}
    for request in engine.requests:
        if request.temperature > 0:
            seeds.setdefault((request.prompt.sample_id, request.temperature), []).append(request.seed)
    return seeds


def test_groups_and_advantages(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rewards against another question's answer, advantages over the wrong group.

    Also zero-variance groups that are trained on.
    """
    collector = make_collector(prompts, tmp_path)
    batch = batch_of(collector, step=3)
    collected = score(collector, batch)
    assert [(c.position, c.draw) for c in collected] == [(i, 0) for i in range(4)] + [
        (i, draw) for i in range(2) for draw in (1, 2, 3)
    ]
    assert [(c.rollout.prompt_id, c.role) for c in collected] == [(s.id, "distill") for s in SAMPLES] + [
        (s.id, "policy") for s in SAMPLES[:2] for _ in range(3)
    ]
    first, second = collected[4:7], collected[7:]
    rewards = [float("one" in c.rollout.text) for c in first]
    assert len(set(rewards)) == 2, "the test's own seeds must give the first group different rewards"
    assert [c.reward for c in first] == rewards and not any(c.zero_variance for c in first)
    assert [c.advantage for c in first] == pytest.approx([r - sum(rewards) / 3 for r in rewards])
    assert [(c.reward, c.advantage, c.zero_variance) for c in second] == [(0.0, 0.0, True)] * 3
    assert all(c.reference_answer == "answer is one" for c in collected[4:])
    assert all(c.reward is None and c.reference_answer is None and c.advantage == 0 for c in collected[:4])
    made = collector.sequences(batch, collected)
    assert [(s.index, s.response.distilled) for s in made] == [(i, True) for i in range(4)] + [
        (i, False) for i in range(4, 7)
    ]
    assert all((s.teacher is not None) == s.response.distilled and s.student.clips for s in made)
    metrics, cut = (
        rollout_metrics(collected, ROLLOUT, ObjectiveConfig()),
        sum(c.rollout.finish_reason == "length" for c in collected),
    )
    always = {"truncated": cut / 10, "repetition": 0.0}
    assert metrics == always | {"reward": pytest.approx(sum(rewards) / 6), "groups": 2, "zero_variance_groups": 1}
    assert set(rollout_metrics(collected[:4], ROLLOUT, ObjectiveConfig())) == set(always)


def test_two_streams_of_the_policy_gradient(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a group that holds another stream's responses, reward or view, and draws that a name changes."""
    streams = {
        "heard": StreamConfig("policy_gradient", "hear", responses=3),
        "read": StreamConfig("policy_gradient", "read", responses=2, reward=TermWeights(agreement=0.0, format=0.5)),
    }
    collector = make_collector(prompts, tmp_path, streams=streams)
    batch = batch_of(collector, step=3)
    collected = score(collector, batch)
    plain = make_collector(prompts, tmp_path)
    expected = score(plain, batch_of(plain, step=3))
    assert [(c.position, c.draw) for c in collected[4:]] == [(i, draw) for i in range(2) for draw in (1, 2, 3, 4, 5)]
    heard, read = ([c for c in collected if c.draw in draws] for draws in ((1, 2, 3), (4, 5)))
    assert collected[:4] == expected[:4] and heard == expected[4:]
    assert all(c.score is not None and c.score.terms == {"format": 1.0} and c.reward == 0.5 for c in read)
    assert all(c.zero_variance for c in read)
    made = collector.sequences(batch, [replace(c, zero_variance=False, advantage=1.0) for c in collected])
    grouped = [s for s in made if not s.response.distilled]
    assert {(s.stream, bool(s.student.clips), s.response.draw > 3) for s in grouped} == {
        ("heard", True, False),
        ("read", False, True),
    }
    metrics = rollout_metrics(collected, ROLLOUT, collector.objective)
    assert (metrics["groups"], metrics["zero_variance_groups"]) == (4, 3)
    assert (metrics["stream/read/reward"], metrics["stream/read/zero_variance_groups"]) == (0.5, 2)
    assert metrics["stream/heard/reward"] == pytest.approx(sum(c.reward or 0 for c in heard) / 6)


def test_no_reference_answers_without_agreement(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches answers that the teacher gives for rewards which compare with the data's own alone."""
    gold = TermWeights(agreement=0.0, gold=1.0)
    objective = ObjectiveConfig(student_view="hear", divergence=DivergenceConfig("none"))
    assert objective.compares(TermWeights()) and not objective.compares(gold)
    one = replace(objective, streams={"a": StreamConfig("policy_gradient", responses=2, reward=gold)})
    assert not one.compares(TermWeights())
    answers = make_collector(prompts, tmp_path).answers
    collector = Collector(ROLLOUT, objective, answers, Rewards(gold), 0, compares=objective.compares(gold))
    assert (collector.answered_per_step, collector.views) == (0, ("hear",))
    batch = batch_of(collector, step=3)
    requests = collector.requests(batch)
    assert len(requests) == 2 * 3 and all(request.temperature > 0 for request in requests)
    collected = score(collector, batch)
    assert len(collected) == 6 and all(c.reference_answer is None and c.reward is not None for c in collected)
    more = collector.more_requests(batch, [2, 3])
    assert len(more) == 2 * 3
    assert len(collector.more_groups(batch, [2, 3], engine_of(collector).generate(more))) == 6


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_step(prompts: PromptBuilder, tmp_path: Path, world: int) -> None:
    """Catches a sample that two data-parallel ranks roll out or train on, or none.

    Also rewards or advantages that depend on the share.
    """
    collector = make_collector(prompts, tmp_path)
    whole = score(collector, batch_of(collector, step=3))
    batches = [batch_of(collector, 3, rank, world) for rank in range(world)]
    parts = [rollout for batch in batches for rollout in score(collector, batch)]
    assert sorted(parts, key=lambda rollout: rollout.order) == whole
    indices = [sequence.index for batch in batches for sequence in collector.sequences(batch, whole)]
    assert sorted(indices) == [s.index for s in collector.sequences(batch_of(collector, step=3), whole)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_groups_of_equal_rewards_are_replaced(prompts: PromptBuilder, tmp_path: Path, world: int) -> None:
    """Catches groups whose replacement depends on the ranks, rounds that never end, and prompts of another step."""
    rollout = replace(ROLLOUT, dynamic_sampling=3)  # the second group is of equal rewards, and so are all others
    collector = make_collector(prompts, tmp_path, rollout=rollout)
    assert collector.answered_per_step == 4
    parts = [batch_of(collector, 3, rank, world) for rank in range(world)]
    collected = run_rounds(collector, rollout, parts)
    groups = {c.position: c for c in collected if c.draw == 1}
    assert {position: c.role for position, c in groups.items()} == {
        0: "policy", 1: "policy", 2: "replaced", 3: "replaced"
    }  # fmt: skip
    assert [c.zero_variance for c in groups.values()] == [False, True, True, True]
    metrics = rollout_metrics(collected, rollout, ObjectiveConfig())
    assert (metrics["groups"], metrics["zero_variance_groups"], metrics["replaced_groups"]) == (2, 1, 2)


def run_rounds(collector: Collector, config: RolloutConfig, parts: list[Batch]) -> list[ScoredRollout]:
    """Return what all data-parallel ranks collect, each a thread of this process, which exchange their groups."""
    barrier, mine = Barrier(len(parts)), list[Any]([None] * len(parts))

    def rank(number: int) -> list[ScoredRollout]:
        def exchange(value: Any) -> list[Any]:
            mine[number] = value
            barrier.wait(30)
            everyone = list(mine)
            barrier.wait(30)
            return everyone

        exchanges.value = exchange
        batch = parts[number]
        return replace_groups(config, collector, batch, score(collector, batch), engine_of(collector).generate)

    exchanges = local()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(parts)) as pool:
        patch.setattr(dynamic_sampling, "all_gather_json", lambda value: exchanges.value(value))
        shares = list(pool.map(rank, range(len(parts))))
    return sorted((c for share in shares for c in share), key=lambda c: c.order)


def test_filtered_responses_have_no_part_in_l_seq(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches responses that were cut and are trained on, or are left out of L_tok where they have a part in it."""
    for share in (False, True):
        rollout = replace(ROLLOUT, share=share)
        policy = PolicyGradientConfig(filter_truncated=True)
        collector = make_collector(prompts, tmp_path, rollout=rollout, policy_gradient=policy)
        batch = batch_of(collector, step=3)
        collected = score(collector, batch)
        first = next(i for i, c in enumerate(collected) if c.draw and not c.zero_variance)
        cut = replace(collected[first].rollout, finish_reason="length")
        collected[first] = replace(collected[first], rollout=cut)
        assert collected[first].advantage != 0
        made = {s.index: s for s in collector.sequences(batch, collected)}
        assert (first in made) == share and first + 1 in made and made[first + 1].response.advantage != 0
        if share:
            assert made[first].response.advantage == 0 and made[first].response.distilled
        objective = collector.objective
        assert rollout_metrics(collected, rollout, objective)["filtered"] == pytest.approx(1 / 6)


def test_views_are_those_that_a_step_needs(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches text prompts that are built for nothing, and a teacher without one."""
    assert make_collector(prompts, tmp_path).views == ("hear", "read")
    fine_tuning = make_collector(
        prompts,
        tmp_path,
        responses="teacher",
        policy_gradient=PolicyGradientConfig(enabled=False),
        divergence=DivergenceConfig("nll"),
    )
    assert list(fine_tuning.views) == ["hear", "read"]
    fine_tuning.answers.mode = "frozen"
    assert list(fine_tuning.views) == ["hear"]


def test_repetition() -> None:
    """Catches a loop that counts as text, plain text that counts as a loop, and short answers that alarm."""
    loop, plain = [1, 2, 3] * 20, list(range(60))
    assert repetition(loop) == pytest.approx(1 - 3 / 57) and repetition(plain) == 0
    assert repetition(plain + plain) == pytest.approx(1 - 60 / 117)
    assert repetition([7] * 7) == repetition([]) == 0 < repetition([7] * 8)


def test_seeds_are_those_that_were_asked_with(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a record whose seeds are another step's, another rollout's of the group, or of another order."""
    collector = make_collector(prompts, tmp_path)
    asked = [request.seed for request in collector.requests(batch_of(collector, 4)) if request.temperature > 0]
    assert [c.seed for c in score(collector, batch_of(collector, step=4))] == asked and len(set(asked)) == 10


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
    for world in (2, 3, 5):
        shares = [drawn(collector, 5, rank, world) for rank in range(world)]
        assert {key: seeds for share in shares for key, seeds in share.items()} == before
    for other in (drawn(collector, step=6), drawn(make_collector(prompts, tmp_path, seed=1), step=5)):
        assert not {s for group in other.values() for s in group} & {s for group in before.values() for s in group}
    assert draw_seed(1, 23) != draw_seed(12, 3) and 0 <= draw_seed("x") < 2**48


def test_shared_responses(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches share=true that still samples for L_tok, or leaves responses of zero-variance groups out of it."""
    rollout = RolloutConfig(
        prompts_per_step=4, policy_prompts_per_step=2, policy_rollouts=3, max_new_tokens=8, share=True
    )
    collector = make_collector(prompts, tmp_path, rollout=rollout)
    batch = batch_of(collector, step=3)
    collected = score(collector, batch)
    assert [c.role for c in collected] == ["shared"] * 6
    made = collector.sequences(batch, collected)
    assert len(made) == 6 and all(s.response.distilled and s.teacher is not None for s in made)
    assert [s.response.advantage != 0 for s in made] == [True] * 3 + [False] * 3


def test_off_policy_takes_the_teachers_answers(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches fine-tuning on the student's own responses, or on answers to what was heard."""
    collector = make_collector(
        prompts,
        tmp_path,
        responses="teacher",
        policy_gradient=PolicyGradientConfig(enabled=False),
        divergence=DivergenceConfig("nll"),
    )
    batch = batch_of(collector, step=0)
    collected = score(collector, batch)
    assert [(c.role, c.rollout.text) for c in collected] == [("distill", "answer is one")] * 4
    assert drawn(collector, step=0) == {}
    made = collector.sequences(batch, collected)
    assert all(s.response.distilled and s.teacher is None and s.student.clips for s in made)


def test_switches_that_need_fewer_rollouts(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rollouts that nobody uses: of L_seq without a policy gradient, of L_tok without a divergence."""
    assert set(
        drawn(make_collector(prompts, tmp_path, policy_gradient=PolicyGradientConfig(enabled=False)), step=0)
    ) == {(s.id, 1.0) for s in SAMPLES}
    assert set(drawn(make_collector(prompts, tmp_path, divergence=DivergenceConfig("none")), step=0)) == {
        (s.id, 1.5) for s in SAMPLES[:2]
    }


def test_numbers_that_cannot_be() -> None:
    """Catches a group of one, whose variance is always zero, more groups than prompts, and a temperature of zero.

    Also which cannot be drawn from.
    """
    for wrong in (
        {"policy_rollouts": 1},
        {"prompts_per_step": 0},
        {"prompts_per_step": 2, "policy_prompts_per_step": 3},
        {"temperature": 0.0},
    ):
        with pytest.raises(CordError):
            RolloutConfig(**wrong)
