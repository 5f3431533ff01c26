"""Each recipe's loss and gradients against its paper's equation, written out in float64, on one rank and on layouts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.compare.methods import METHODS
from megatron_cord.config.loading import load_config
from megatron_cord.data.samples import Prompt
from megatron_cord.data.views import Views
from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig
from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import initialize
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.streams import ContrastConfig, StreamConfig
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from megatron_cord.trainer.teachers import TeacherRoutes
from megatron_cord.verify.layout import Row, VerifyLayoutConfig, compare, train_once
from megatron_cord.verify.layout_reference import (
    PARTS,
    Outcome,
    Sizes,
    _log_probabilities,
    make_checkpoint,
    make_sequences,
)
from megatron_cord.verify.lora_reference import published_name
from tests.gloo import run_ranks
from tests.tiny_run import ROOT

RECIPES = ROOT / "examples" / "recipes"
SIZES = Sizes(layers=2, heads=4, kv_heads=2, sequences=4, longest=9)
LAYOUTS = {
    "tp2 packed": ["parallel.tp=2", "parallel.sequence_parallel=true", "train.packing=packed"],
    "pp2": ["parallel.pp=2"],
    "cp2 packed": ["parallel.cp=2", "train.packing=packed"],
}
#: The equation of a response: from log p and log q, [T, V] (of a contrast log q on both views, [2, T, V]), its tokens
#: [T] and the engine's log-probabilities [T].
Equation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def reverse_kl(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t Σ_v p (log p − log q)."""
    return (log_p.exp() * (log_p - log_q)).sum()


def jensen_shannon(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t ½ KL(q‖m) + ½ KL(p‖m), m = (p + q)/2."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum() / 2


def sampled(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """−Σ_t min(p/p_engine, 2) A_t log p(y_t), A_t = log q(y_t) − log p(y_t) a number."""
    student, teacher = (values.gather(1, tokens[:, None])[:, 0] for values in (log_p, log_q))
    weight = (student.detach() - engine).exp().clamp(max=2.0)
    return -(weight * (teacher - student).detach() * student).sum()


def forward_kl(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t Σ_v q (log q − log p)."""
    return (log_q.exp() * (log_q - log_p)).sum()


def one_sided(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t max(0, log q(y_t) − log p(y_t)) / T."""
    student, teacher = (values.gather(1, tokens[:, None])[:, 0] for values in (log_p, log_q))
    return (teacher - student).clamp(min=0).sum() / len(tokens)


def mean_reverse_kl(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t Σ_v p (log p − log q) / T."""
    return reverse_kl(log_p, log_q, tokens, engine) / len(tokens)


def policy(log_p: Tensor, tokens: Tensor, engine: Tensor, advantage: float) -> Tensor:
    """Return −A Σ_t min(p_old/p_engine, 2) p(y_t)/p_old(y_t), p_old the same p, as a number."""
    student = log_p.gather(1, tokens[:, None])[:, 0]
    old = student.detach()
    return -advantage * ((old - engine).exp().clamp(max=2.0) * (student - old).exp()).sum()


def cord_weighted(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t w_t D_t; responses here have fewer tokens than K, so that all of them have α."""
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    return (2.0 * torch.linspace(2.0, 1.0, len(tokens), dtype=torch.float64) * divergence).sum()


def cross_entropy(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """−Σ_t log p(y_t)."""
    return -log_p.gather(1, tokens[:, None]).sum()


def contrastive(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t 1[|log a(y_t) − log b(y_t)| > 0.1] Σ_v p (log p − log q), q ∝ a · a/b, a of the teacher's view."""
    log_a, log_b = log_q
    log_q = (2 * log_a - log_b).log_softmax(1)
    gate = (log_a - log_b).gather(1, tokens[:, None])[:, 0].abs() > 0.1  # leaves out 2 of the 21 tokens here
    return torch.where(gate, (log_p.exp() * (log_p - log_q)).sum(1), 0.0).sum()


def top_tokens(log_p: Tensor, log_q: Tensor, tokens: Tensor, engine: Tensor) -> Tensor:
    """Σ_t Σ_K q (log q − log p) + r_q log(r_q/r_p), K the 5 likeliest tokens of q; `TOP` says why 5."""
    inside = torch.zeros_like(log_q, dtype=torch.bool).scatter(1, log_q.topk(TOP).indices, True)
    p, q = log_p.exp(), log_q.exp()
    tail_p, tail_q = (p * ~inside).sum(1), (q * ~inside).sum(1)
    return (q * (log_q - log_p) * inside).sum() + (tail_q * (tail_q / tail_p).log()).sum()


#: Tokens of ts_opd's divergence here: the model has fewer than the recipe's 128.
TOP = 5
#: Of each recipe: its equation, or one of each stream, and whether the sum is divided by tokens or by responses.
EQUATIONS: dict[str, tuple[Equation | list[Equation], str]] = {
    "cord": (cord_weighted, "response"),
    "x_opd": (sampled, "token"),
    "x3_opd": (reverse_kl, "token"),
    "para_bridge": (jensen_shannon, "token"),
    "echo_distill": (reverse_kl, "token"),
    "sdft": (reverse_kl, "token"),
    "gkd": (jensen_shannon, "token"),
    "rt_opd": ([cross_entropy, contrastive], "token"),
    "ts_opd": (top_tokens, "token"),
    "opod": ([one_sided, one_sided, mean_reverse_kl, mean_reverse_kl], "response"),
    "sft": (cross_entropy, "response"),
    "off_policy_kl": (forward_kl, "response"),
    "forward_kl": (forward_kl, "response"),
    "reverse_kl": (reverse_kl, "response"),
}
#: λ of each stream
WEIGHTS = {
    "x_opd": {"in_modal": 0.5, "cross_modal": 0.5},
    "rt_opd": {"contrastive": 0.25},
    "opod": {"stay_text": 0.01, "stay_audio": 0.01},
}
#: Recipes that have streams of the policy gradient, and what a response's sum is divided by beside their number
MEANS = {"opod": "response_mean", "tars": "token"}
NAMES = tuple(dict.fromkeys((*EQUATIONS, *MEANS)))


def load_recipe(name: str) -> RunConfig:
    """Return a recipe with what a user must give."""
    given = ["output_dir=out", "model.checkpoint=checkpoint", "data.evaluation=heldout"]
    several = ["data.train.asr.path=asr", "data.train.qa.path=qa", "teachers.asr.checkpoint=expert"]
    given += several if name == "ts_opd" else ["data.train=train"]
    given += ["reward.judge.base_url=http://localhost/v1", "reward.judge.model=teacher"] if name == "opod" else []
    return load_config(RunConfig, RECIPES / f"{name}.yaml", given)


def make_step(recipe: RunConfig, objective: ObjectiveConfig) -> list[TrainingSequence]:
    """Return responses of each stream, two at most to a sample; each view of a sample has a prompt of its own.

    Samples are of the training sets in turn. L_seq of the stream without a name is left out.
    """
    views, prompts = Views(recipe.views), dict[tuple[str, int], Prompt]()
    sets, routes = list(recipe.data.training_sets.items()), TeacherRoutes(recipe.data.training_sets)
    stand_ins = [other for _, each in sets for other in each.views.values()]
    for number, name in enumerate((*objective.views, *stand_ins)):
        for position, made in enumerate(make_sequences(SIZES, seed=number)):
            words = tuple(token for token in made.student.token_ids if token != SIZES.vocabulary - 1)
            with_audio = views.named(name, "a view").filters is not None
            prompts[name, position] = made.student if with_audio else Prompt(made.student.sample_id, words)
    sequences: list[TrainingSequence] = []
    for term in objective.terms:
        draws = [draw for draw in objective.draws if objective.term_of(draw).name == term.name]
        for draw in draws[:2]:
            for position, made in enumerate(make_sequences(SIZES, seed=10 - draw)):
                response = replace(made.response, role="distill", position=position, draw=draw, advantage=0.0)
                set_name, own = sets[position % len(sets)]
                student = prompts[term.student, position]
                teacher = prompts[own.views.get(term.teacher, term.teacher), position] if term.distils else None
                contrast = None if term.contrast is None else prompts[term.contrast.view, position]
                taught_by = routes.of_set(term, set_name)
                sequences.append(
                    TrainingSequence(student, teacher, response, len(sequences), term.name, contrast, taught_by)
                )
    for policy in objective.policy_terms:
        for draw in list(objective.groups(1)[policy.name])[:2]:
            for position, made in enumerate(make_sequences(SIZES, seed=20 + draw)):
                advantage = made.response.advantage * draw  # another one for each response
                response = replace(made.response, role="policy", position=position, draw=draw, advantage=advantage)
                student = prompts[policy.student, position]
                sequences.append(TrainingSequence(student, None, response, len(sequences), policy.name))
    return sequences


def expected(directory: Path, recipe: str, sequences: list[TrainingSequence], frozen: tuple[str, ...]) -> Outcome:
    """Return loss and gradients of the recipe's equation: one sequence after the other.

    Writes the student's checkpoint into the directory, and below it that of each further teacher.
    """
    model = make_checkpoint(directory, SIZES, seed=0).double().train()
    teachers = {"": model}
    for name in sorted({s.taught_by for s in sequences} - {""}):
        (directory / name).mkdir()
        teachers[name] = make_checkpoint(directory / name, SIZES, seed=1).double()
    for name, parameter in model.named_parameters():
        part_of = published_name(name)
        parameter.requires_grad_("embed_positions" not in name and not any(PARTS[part] in part_of for part in frozen))
    loss = torch.zeros((), dtype=torch.float64)
    streams = list(dict.fromkeys(s.stream for s in sequences))
    for stream in streams:
        own = [s for s in sequences if s.stream == stream]
        lengths = sum(len(s.rollout.token_ids) for s in own)
        weight = WEIGHTS.get(recipe, {}).get(stream, 1.0)
        for sequence in own:
            log_p = log_q = _log_probabilities(model, sequence.student, sequence.rollout)
            tokens = torch.tensor(sequence.rollout.token_ids)
            engine = torch.tensor(sequence.rollout.logprobs, dtype=torch.float64)
            if not sequence.response.distilled:
                mean = len(tokens) * len(own) if MEANS[recipe] == "response_mean" else lengths
                loss = loss + weight * policy(log_p, tokens, engine, sequence.response.advantage) / mean
                continue
            with torch.no_grad():
                if sequence.teacher is not None:
                    log_q = _log_probabilities(teachers[sequence.taught_by], sequence.teacher, sequence.rollout)
                if sequence.contrast is not None:
                    log_q = torch.stack([log_q, _log_probabilities(model, sequence.contrast, sequence.rollout)])
            given, divided = EQUATIONS[recipe]
            equation = given[streams.index(stream)] if isinstance(given, list) else given
            loss = loss + weight * equation(log_p, log_q, tokens, engine) / (
                lengths if divided == "token" else len(own)
            )
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {published_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.item(), gradients, {})


def run_recipes(_rank: int, names: list[str], settings: list[str]) -> dict[str, list[Row]]:
    """Return what differs from the oracle, by recipe."""
    config = load_config(VerifyLayoutConfig, None, settings)
    layout = initialize(config.parallel, config.seed)
    found = {}
    for name in names:
        recipe = load_recipe(name)
        objective = recipe.objective
        if name not in MEANS:
            objective = replace(objective, policy_gradient=replace(objective.policy_gradient, enabled=False))
        if objective.divergence.kind == "forward_topk":
            assert objective.divergence.k == 128 > SIZES.vocabulary
            objective = replace(objective, divergence=replace(objective.divergence, k=TOP))
        sequences = make_step(recipe, objective)
        with tempfile.TemporaryDirectory() as directory:
            reference = expected(Path(directory), name, sequences, recipe.model.freeze)
            student = build_student(ModelConfig(directory, dtype="float32", freeze=recipe.model.freeze), layout)
            teacher = Teacher(TeacherConfig(), student, directory, with_audio="" in recipe.audio_teachers)
            others = {
                each: Teacher(TeacherConfig(checkpoint=str(Path(directory, each))), student, directory)
                for each in recipe.teachers
            }
        actual = train_once(config, layout, student, teacher, objective, sequences, others)
        weights = {"not compared": torch.ones(1)}
        found[name] = compare(replace(actual, weights=weights), replace(reference, weights=weights), "float32")
    parallel_state.destroy_model_parallel()
    return found


@cache
def on_ranks(layout: str) -> dict[str, list[Row]]:
    ranks = 1 if layout == "one rank" else 2
    found: dict[str, list[Row]] = run_ranks(run_recipes, ranks, list(NAMES), LAYOUTS.get(layout, []))[0]
    return found


@pytest.mark.parametrize("recipe", NAMES)
def test_recipes_equal_their_oracles(recipe: str) -> None:
    """Catches another divergence, weight, view, denominator or frozen part than the recipe's paper has."""
    check(on_ranks("one rank")[recipe], load_recipe(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", NAMES)
def test_recipes_on_layouts(recipe: str, layout: str) -> None:
    """Catches streams that meet in one packed microbatch, or a rank that weighs a stream by its own share."""
    check(on_ranks(layout)[recipe], load_recipe(recipe))


@pytest.mark.parametrize("name", ["sft", "off_policy_kl", "reverse_kl"])
def test_baselines_are_the_comparisons(name: str) -> None:
    """Catches a baseline's file that is another method than the one of `cord compare` with its name."""
    settings = ["output_dir=out", "model.checkpoint=checkpoint", "data.train=train", "data.evaluation=heldout"]
    method = load_config(RunConfig, None, [*settings, *METHODS[name].settings])
    assert load_recipe(name).objective == method.objective


def check(rows: list[Row], recipe: RunConfig) -> None:
    trains_a_tower = len(recipe.model.freeze) < 2 or recipe.model.freeze == ("audio_encoder", "adapter")
    assert sum(row.name.startswith("gradient") for row in rows) > (20 if trains_a_tower else 1)
    failed = [row for row in rows if not row.passed]
    assert not failed, failed[:5]


def test_a_stream_of_the_policy_gradient_is_the_objectives() -> None:
    """Catches numbers of responses, a view or a loss that a name changes, and a stream that replaces the other kind."""
    plain = ObjectiveConfig(policy_gradient=PolicyGradientConfig(weight=0.5))
    named = replace(plain, streams={"only": StreamConfig("policy_gradient", responses=3)})
    assert named.groups(7) == {"only": range(1, 4)} and plain.groups(3) == {"": range(1, 4)}
    assert named.draws == plain.draws == (0,) and named.views == plain.views and named.terms == plain.terms
    assert named.within("only") == plain
    two = {
        "a": StreamConfig("policy_gradient", responses=2, weight=3.0),
        "b": StreamConfig("policy_gradient", "read", responses=2),
    }
    both = replace(plain, streams=two | {"c": StreamConfig(student="read")})
    assert [both.policy_term_of(draw).name for draw in (1, 2, 3, 4)] == ["a", "a", "b", "b"]
    assert both.groups(7) == {"a": range(1, 3), "b": range(3, 5)} and both.views == ("hear", "read")
    assert both.within("a").policy_gradient.weight == 1.5 and both.term_of(0).name == "c"


def test_a_single_stream_is_the_objective_without_streams() -> None:
    """Catches a stream that changes what is drawn or trained on where nothing but its name is new."""
    plain = ObjectiveConfig()
    named = ObjectiveConfig(streams={"only": StreamConfig()})
    assert plain.draws == named.draws == (0,)
    (one,), (other,) = plain.terms, named.terms
    assert replace(one, name="only") == other and plain.views == named.views
    assert named.within("only") == plain and plain.within("") is plain


def test_what_cannot_be_meant_is_refused() -> None:
    """Catches streams that would be left out, or trained on with a wrong gradient."""
    sampled_elsewhere = StreamConfig(rollout="read", divergence=DivergenceConfig("sampled"))
    for streams, message in (
        ({"a": StreamConfig(divergence=DivergenceConfig("none"))}, "leave the stream out"),
        ({"a": sampled_elsewhere}, "samples from the view read and trains on hear"),
        ({"a b": StreamConfig()}, "the name 'a b'"),
        ({"a": StreamConfig(source="answer", divergence=DivergenceConfig("sampled"))}, "is not the student's"),
        ({"a": StreamConfig(contrast=ContrastConfig("read"))}, r"contrast\.view=read is the view that the teacher"),
        ({"a": StreamConfig(contrast=ContrastConfig("x"), divergence=DivergenceConfig("nll"))}, "needs a teacher"),
    ):
        with pytest.raises(CordError, match=message):
            ObjectiveConfig(streams=streams)
    with pytest.raises(CordError, match="responses=student"):
        ObjectiveConfig(streams={"a": StreamConfig()}, responses="teacher")
    with pytest.raises(CordError, match="weight is 0"):
        StreamConfig(weight=0.0)
    with pytest.raises(CordError, match="source is answer, of which a sample has one"):
        StreamConfig(source="answer", responses=2)
    with pytest.raises(CordError, match="alpha is 0"):
        ContrastConfig("x", alpha=0.0)
    with pytest.raises(CordError, match="responses is 0"):
        StreamConfig(responses=0)
    with pytest.raises(CordError, match="reward is of a stream of the kind policy_gradient"):
        StreamConfig(reward=TermWeights())
    with pytest.raises(CordError, match="teacher is of a distillation"):
        StreamConfig("policy_gradient", teacher="read", responses=4)
    with pytest.raises(CordError, match="give at least 2"):
        StreamConfig("policy_gradient")
    off = PolicyGradientConfig(enabled=False)
    with pytest.raises(CordError, match=r"streams\.a is of the kind policy_gradient and .*enabled is false"):
        ObjectiveConfig(streams={"a": StreamConfig("policy_gradient", responses=2)}, policy_gradient=off)
