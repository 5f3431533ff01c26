"""The objective against loops in float64, one token at a time."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.losses import DivergenceConfig, PolicyGradientConfig, TokenWeightsConfig
from megatron_cord.model.lalm import ModelInput
from megatron_cord.rollout.types import Role, Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.batches import Microbatch, TrainingSequence
from megatron_cord.trainer.step.batching.token_layout import Rows
from megatron_cord.trainer.step.microbatch_loss import MicrobatchLoss, microbatch_loss
from megatron_cord.trainer.step.objective import GlobalCounts, ObjectiveConfig

LENGTHS, HIDDEN, VOCABULARY, PADDED = [5, 1, 4], 6, 11, 16
TOKENS = sum(LENGTHS)
UNIFORM, OFF = TokenWeightsConfig("uniform"), PolicyGradientConfig(enabled=False)
COUNTS = GlobalCounts(scored=7, policy=5)


def numbers(seed: int) -> dict[str, Tensor]:
    """Hidden states [N, H] and output weights [V_padded, H] of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "student": (TOKENS, HIDDEN),
        "student_weight": (PADDED, HIDDEN),
        "teacher": (TOKENS, HIDDEN),
        "teacher_weight": (PADDED, HIDDEN),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_batch(advantages: list[float], *, scored: bool = True) -> Microbatch:
    """Responses of LENGTHS; the inputs of the model itself do not matter here."""
    empty = ModelInput(torch.zeros(1, 1, dtype=torch.int64), None, None, ())
    role: Role = "shared" if scored else "policy"
    rollouts = [ScoredRollout(Rollout("s", (), (), "stop", (), ""), role, advantage=a) for a in advantages]
    sequences = tuple(TrainingSequence(Prompt("s", ()), None, rollout, i) for i, rollout in enumerate(rollouts))
    generator = torch.Generator().manual_seed(9)
    return Microbatch(
        student=empty,
        student_rows=Rows(torch.arange(TOKENS), None),
        teacher=empty,
        teacher_rows=Rows(torch.arange(TOKENS), None),
        target_ids=torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in LENGTHS]),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0),
        lengths=torch.tensor(LENGTHS),
        engine_logprobs=-3 * torch.rand(TOKENS, generator=generator),
        advantages=torch.tensor(advantages),
        sequences=sequences,
    )


def computed(
    config: ObjectiveConfig, batch: Microbatch, values: dict[str, Tensor], *, teacher: bool = True
) -> MicrobatchLoss:
    hidden, weight = (values["teacher"], values["teacher_weight"]) if teacher else (None, None)
    return microbatch_loss(
        config, COUNTS, batch, values["student"], values["student_weight"], hidden, weight, VOCABULARY, None
    )


def expected(config: ObjectiveConfig, batch: Microbatch, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L_tok and L_seq in float64, by loops over sequences and tokens."""
    log_p = (values["student"].double() @ values["student_weight"].double().T)[:, :VOCABULARY].log_softmax(-1)
    log_q = (values["teacher"].double() @ values["teacher_weight"].double().T)[:, :VOCABULARY].log_softmax(-1)
    token_loss, sequence_loss, start = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for length, advantage in zip(LENGTHS, batch.advantages.tolist(), strict=True):
        divergences, chosen_terms, ratios = [], list[Tensor](), list[float]()
        for n in range(start, start + length):
            chosen = log_p[n, int(batch.target_ids[n])]
            middle = (config.divergence.beta * log_q[n].exp() + (1 - config.divergence.beta) * log_p[n].exp()).log()
            ratio = min(
                float(chosen.detach().exp()) / float(batch.engine_logprobs[n].double().exp()),
                config.policy_gradient.importance_cap,
            )
            divergences.append({
                "reverse_kl": (log_p[n].exp() * (log_p[n] - log_q[n])).sum(),
                "forward_kl": (log_q[n].exp() * (log_q[n] - log_p[n])).sum(),
                "jsd": config.divergence.beta * (log_q[n].exp() * (log_q[n] - middle)).sum()
                + (1 - config.divergence.beta) * (log_p[n].exp() * (log_p[n] - middle)).sum(),
                "sampled": ratio * float((chosen - log_q[n, int(batch.target_ids[n])]).detach()) * chosen,
                "nll": -chosen,
                "none": torch.zeros(()),
            }[config.divergence.kind])  # fmt: skip
            chosen_terms.append(chosen)
            ratios.append(ratio)
        policy = config.policy_gradient
        for chosen, ratio in zip(chosen_terms, ratios, strict=True) if policy.enabled else ():
            term, factor = chosen, ratio
            if policy.surrogate == "clipped":  # of a single update: nothing is clipped
                term = (chosen - chosen.detach()).exp()
                factor = sum(ratios) / length if policy.ratio == "sequence" else ratio
            mean = length if policy.normalization == "response_mean" else 1
            sequence_loss = sequence_loss - policy.weight * advantage * factor * term / mean / COUNTS.policy
        largest = sorted(range(length), key=lambda t: -divergences[t].item())[: config.token_weights.top_k]
        for t in range(length):
            weight = 1.0
            if config.token_weights.factors == "cord":
                alpha, beta = config.token_weights.alpha, config.token_weights.beta
                weight = (alpha if t in largest else 1.0) * (beta - (beta - 1) * t / max(length - 1, 1))
            token_loss = token_loss + weight * divergences[t] / COUNTS.scored
        start += length
    return token_loss, sequence_loss


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "nll"])
@pytest.mark.parametrize("token_weights", ["cord", "uniform"])
@pytest.mark.parametrize("policy", [True, False])
def test_both_losses_and_their_gradients(divergence: Any, token_weights: Any, policy: bool) -> None:
    """Catches a wrong formula, a denominator that is not the step's, and gradients through weights or ratios."""
    config = ObjectiveConfig(
        divergence=DivergenceConfig(divergence),
        token_weights=TokenWeightsConfig(token_weights, top_k=2, alpha=3.0, beta=1.5),
        policy_gradient=PolicyGradientConfig(policy, weight=0.7, importance_cap=1.3),
    )
    assert_as_expected(config)


@pytest.mark.parametrize("implementation", ["cached_grad", "fused", "recompute"])
def test_sampled_tokens_as_policy_gradient(implementation: Any) -> None:
    """Catches a gradient through the log-ratio, a forgotten importance weight, and a fused pass with another loss."""
    assert_as_expected(
        ObjectiveConfig(
            divergence=DivergenceConfig("sampled"),
            token_weights=UNIFORM,
            policy_gradient=PolicyGradientConfig(importance_cap=1.3),
            implementation=implementation,
        )
    )


def test_sampled_tokens_estimate_the_reverse_kl() -> None:
    """Catches a sign or a factor: over all tokens that could be sampled, the mean gradient is the reverse KL's."""
    gradients = []
    kinds: tuple[Literal["sampled", "reverse_kl"], ...] = ("sampled", "reverse_kl")
    for divergence in kinds:
        config = ObjectiveConfig(divergence=DivergenceConfig(divergence), token_weights=UNIFORM, policy_gradient=OFF)
        values, batch = numbers(5), make_batch([0.0, 0.0, 0.0])
        student = values["student"].requires_grad_()
        log_p = (student @ values["student_weight"].T)[:, :VOCABULARY].log_softmax(-1).detach()
        total = torch.zeros_like(student)
        for token in range(VOCABULARY):
            batch.target_ids[:] = token
            batch.engine_logprobs[:] = log_p[:, token]
            (gradient,) = torch.autograd.grad(computed(config, batch, values).total, student)
            total += log_p[:, token, None].exp() * gradient
        gradients.append(total)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def assert_as_expected(config: ObjectiveConfig) -> None:
    """Both losses and the student's gradients against `expected`."""
    batch, values = make_batch([0.5, 0.0, -1.0], scored=config.divergence.kind != "none"), numbers(0)
    gradients = []
    for fn in (computed, expected):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
        if fn is computed:
            loss = computed(config, batch, leaves, teacher=config.distils)
            token, sequence, total = loss.token, loss.sequence, loss.total
        else:
            token, sequence = expected(config, batch, leaves)
            total = token + sequence
        total.backward()  # type: ignore[no-untyped-call]
        gradients.append(
            (token.detach().double(), sequence.detach().double(), leaves["student"].grad, leaves["student_weight"].grad)
        )
        assert leaves["teacher"].grad is None or fn is expected
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_policy_gradient_alone() -> None:
    """Catches a token loss where none is wanted, and a teacher that is needed although nothing is distilled."""
    config = ObjectiveConfig(divergence=DivergenceConfig("none"))
    batch, values = make_batch([0.5, 0.0, -1.0], scored=False), numbers(1)
    loss = computed(config, batch, values, teacher=False)
    assert float(loss.token) == 0 and loss.weights is None
    torch.testing.assert_close(loss.sequence.double(), expected(config, batch, values)[1], rtol=1e-4, atol=1e-6)


def test_responses_of_the_policy_have_no_token_loss() -> None:
    """Catches rollouts at the policy's temperature that enter L_tok, which samples its own."""
    loss = computed(ObjectiveConfig(), make_batch([1.0, 1.0, 1.0], scored=False), numbers(2))
    assert float(loss.token) == 0 and float(loss.sequence) != 0


@pytest.mark.parametrize("broken", ["student", "student_weight", "teacher"])
def test_broken_numbers_make_a_broken_loss(broken: str) -> None:
    """Catches an exception where the trainer should skip the step and count."""
    values = numbers(3)
    values[broken][2, 1] = torch.nan
    assert not torch.isfinite(computed(ObjectiveConfig(), make_batch([0.5, 0.0, -1.0]), values).token)


def test_an_engine_without_logprobs_makes_a_broken_loss() -> None:
    """Catches NaN of an engine whose weights overflowed that stops the run at once, or goes unnoticed."""
    batch = make_batch([0.5, 0.0, -1.0])
    batch.engine_logprobs[3] = torch.nan
    loss = computed(ObjectiveConfig(), batch, numbers(4))
    assert torch.isfinite(loss.token) and torch.isnan(loss.sequence)
    assert torch.isnan(
        computed(
            ObjectiveConfig(divergence=DivergenceConfig("sampled"), token_weights=UNIFORM), batch, numbers(4)
        ).token
    )


def test_settings_that_leave_nothing_to_train() -> None:
    """Catches a run that trains on nothing, or on a policy gradient of responses that the student did not sample."""
    with pytest.raises(CordError, match="nothing is left to train on"):
        ObjectiveConfig(divergence=DivergenceConfig("none"), policy_gradient=OFF)
    with pytest.raises(CordError, match=r"needs objective\.responses=student"):
        ObjectiveConfig(responses="teacher")
    with pytest.raises(CordError, match="an estimate from tokens that the student sampled"):
        ObjectiveConfig(responses="teacher", policy_gradient=OFF, divergence=DivergenceConfig("sampled"))
