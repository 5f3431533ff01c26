"""Several updates a step against float64 steps of a transformers model, one sequence after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from megatron_cord.convert import export_tensors
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig
from megatron_cord.model.config import ModelConfig
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.trainer.config import TrainConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from megatron_cord.verify.layout_reference import (
    Sizes,
    _log_probabilities,
    make_checkpoint,
    make_sequences,
)
from megatron_cord.verify.lora_reference import published_name
from tests.gloo import run_ranks

SIZES = Sizes(layers=2, heads=4, kv_heads=2, sequences=4, longest=10)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, final_learning_rate_fraction=1.0)
POLICY = PolicyGradientConfig(surrogate="clipped", clip_low=0.02, clip_high=0.03, normalization="response_mean")


def sequences() -> list[TrainingSequence]:
    """Two groups of two responses, of different advantages; no part in L_tok."""
    made = []
    for index, sequence in enumerate(make_sequences(SIZES, seed=0)):
        response = replace(
            sequence.response,
            role="policy",
            position=index // 2,
            draw=1 + index % 2,
            advantage=(0.5, -0.25, 1.0, -1.0)[index],
        )
        made.append(TrainingSequence(sequence.student, None, response, index))
    return made


def expected(
    model: Qwen2AudioForConditionalGeneration, minibatches: int, passes: int
) -> tuple[dict[str, Tensor], list[Tensor], list[float], list[float]]:
    """Weights after the step, old log-probabilities, the ratios of all tokens in all updates, and gradient norms."""
    model = model.double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_positions" not in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=betas, eps=OPTIMIZER.epsilon, weight_decay=0.0)
    given, ratios, norms = sequences(), list[float](), list[float]()

    def logprobs(sequence: TrainingSequence) -> Tensor:
        chosen = torch.tensor(sequence.rollout.token_ids)[:, None]
        return _log_probabilities(model, sequence.student, sequence.rollout).gather(1, chosen)[:, 0]

    old = [logprobs(sequence).detach() for sequence in given]
    for _ in range(passes):
        for part in range(minibatches):
            optimizer.zero_grad()
            members = [i for i in range(4) if (i // 2) * minibatches // 2 == part]
            for i in members:
                advantage, engine = given[i].response.advantage, torch.tensor(given[i].rollout.logprobs).double()
                ratio = (logprobs(given[i]) - old[i]).exp()
                weight = (old[i] - engine).exp().clamp(max=POLICY.importance_cap)
                clipped = ratio.clamp(1 - POLICY.clip_low, 1 + POLICY.clip_high)
                terms = weight * torch.minimum(ratio * advantage, clipped * advantage)
                (-terms.mean() / len(members)).backward()  # type: ignore[no-untyped-call]
                ratios += ratio.tolist()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)))
            optimizer.step()
    return {published_name(n): p.detach() for n, p in model.named_parameters()}, old, ratios, norms


@pytest.mark.parametrize(("minibatches", "passes"), [(2, 1), (1, 2), (2, 2)])
def test_updates_equal_the_reference(tmp_path: Path, layout: Layout, minibatches: int, passes: int) -> None:
    """Catches old log-probabilities of another policy, a denominator of the whole step, and a forgotten update."""
    compare_updates(tmp_path, layout, minibatches, passes)


@pytest.mark.slow
def test_updates_with_the_loss_on_all_stages(tmp_path: Path) -> None:
    """Catches the same where stages before the last one need the old log-probabilities, too."""
    run_ranks(compare_on_two_stages, 2, str(tmp_path))


def compare_on_two_stages(rank: int, directory: str) -> None:
    """Compare two updates on a rank's stage, with files of its own."""
    own = Path(directory) / str(rank)
    own.mkdir()
    compare_updates(own, initialize(ParallelConfig(pp=2, vocabulary_over_stages=True), seed=0), 1, 2)


def compare_updates(directory: Path, layout: Layout, minibatches: int, passes: int) -> None:
    """Compare a step with the reference's."""
    model = make_checkpoint(directory, SIZES, seed=0)
    student = build_student(ModelConfig(str(directory), dtype="float32"), layout)
    wrapped = wrap_model(OPTIMIZER, student)
    optimizer, scheduler = build_optimizer(OPTIMIZER, wrapped, steps=10)
    config = TrainConfig(minibatches=minibatches, passes=passes, micro_batch_size=1)
    objective = ObjectiveConfig(divergence=DivergenceConfig("none"), policy_gradient=POLICY)
    teacher = Teacher(TeacherConfig(mode="live"), student, str(directory))
    step = TrainStep(wrapped, teacher, optimizer, scheduler, objective, config, pad_id=0, max_new_tokens=10)
    given = sequences()
    result = step(given, [s.response for s in given])
    weights, old, ratios, norms = expected(model, minibatches, passes)
    for name, tensor in export_tensors(student):
        if name in weights:
            torch.testing.assert_close(
                tensor.double(), weights[name], rtol=1e-4, atol=3e-4
            )  # of updates of 3e-3, near 0 by chance
    for rollout, logprobs in zip(result.rollouts, old, strict=True):
        assert rollout.tokens is not None
        assert rollout.tokens.student_logprobs == pytest.approx(logprobs.tolist(), rel=1e-4, abs=1e-5)
    metrics = result.metrics
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert metrics["updates"] == minibatches * passes and not result.skipped
    assert metrics["ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(max(ratios), rel=1e-3) and metrics["ratio_max"] > 1.03
    assert metrics["clipped_low"] + metrics["clipped_high"] > 0
    release(wrapped)


def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path, layout: Layout) -> None:
    """Catches one broken mini-batch that takes the others' updates with it, or a step that says nothing of it."""
    make_checkpoint(tmp_path, SIZES, seed=0)
    student = build_student(ModelConfig(str(tmp_path), dtype="float32"), layout)
    wrapped = wrap_model(OPTIMIZER, student)
    optimizer, scheduler = build_optimizer(OPTIMIZER, wrapped, steps=10)
    objective = ObjectiveConfig(divergence=DivergenceConfig("none"), policy_gradient=POLICY)
    teacher = Teacher(TeacherConfig(mode="live"), student, str(tmp_path))
    step = TrainStep(
        wrapped, teacher, optimizer, scheduler, objective, TrainConfig(minibatches=2), pad_id=0, max_new_tokens=10
    )
    given = sequences()
    broken = replace(given[3].rollout, logprobs=(float("nan"),) * len(given[3].rollout.token_ids))
    given[3] = replace(given[3], response=replace(given[3].response, rollout=broken))
    before = {name: tensor.clone() for name, tensor in export_tensors(student)}
    result = step(given, [s.response for s in given])
    assert result.skipped and result.metrics["updates"] == 1
    after = dict(export_tensors(student))
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    release(wrapped)


@pytest.mark.parametrize("kind", ["nll", "forward_kl", "none"])
def test_scores_are_the_reverse_kl_of_any_objective(
    tmp_path: Path, layout: Layout, kind: Literal["nll", "forward_kl", "none"]
) -> None:
    """Catches evaluations of two methods whose divergences are two measures, or of one that has none."""
    model = make_checkpoint(tmp_path, SIZES, seed=0).double()
    student = build_student(ModelConfig(str(tmp_path), dtype="float32"), layout)
    wrapped = wrap_model(OPTIMIZER, student)
    optimizer, scheduler = build_optimizer(OPTIMIZER, wrapped, steps=10)
    policy = replace(POLICY, enabled=kind == "none")
    objective = ObjectiveConfig(divergence=DivergenceConfig(kind), policy_gradient=policy)
    teacher = Teacher(TeacherConfig(), student, str(tmp_path))
    step = TrainStep(wrapped, teacher, optimizer, scheduler, objective, TrainConfig(), pad_id=0, max_new_tokens=10)
    given = [sequence for sequence in make_sequences(SIZES, seed=0) if sequence.teacher is not None]
    scored = step.score(given)
    assert len(given) > 1
    for sequence in given:
        assert sequence.teacher is not None
        found, rollout = scored[sequence.index].kl, sequence.rollout
        ours, theirs = (_log_probabilities(model, p, rollout) for p in (sequence.student, sequence.teacher))
        assert found == pytest.approx((ours.exp() * (ours - theirs)).sum(-1).tolist(), rel=1e-3, abs=1e-6)
    release(wrapped)
