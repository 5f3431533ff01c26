"""The objective's choices reach the loss: divergences, implementations, composed weights, hidden states on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.losses import (
    DivergenceConfig,
    PolicyGradientConfig,
    TokenWeightsConfig,
    divergence_from_hidden,
    token_logprobs_from_hidden,
    token_weights,
)
from megatron_cord.losses.implementations import output_layer
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.transfers import to_host
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step import microbatch_loss as microbatch_loss_module
from megatron_cord.trainer.step.batching.batches import Microbatch, TrainingSequence
from megatron_cord.trainer.step.batching.token_layout import Rows
from megatron_cord.trainer.step.microbatch_loss import microbatch_loss
from megatron_cord.trainer.step.objective import GlobalCounts, ObjectiveConfig


def batch_of(lengths: list[int], advantages: list[float] | None = None) -> Microbatch:
    advantages = advantages or [0.0] * len(lengths)
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    nothing = ModelInput(torch.zeros(1, 1, dtype=torch.int64), None, None, ())
    response = ScoredRollout(Rollout("s", (), (), "stop", (), ""), "distill")
    responses = [replace(response, advantage=advantage) for advantage in advantages]
    return Microbatch(
        student=nothing,
        student_rows=Rows(torch.arange(tokens), None),
        teacher=nothing,
        teacher_rows=Rows(torch.arange(tokens), None),
        target_ids=torch.randint(0, 11, (tokens,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        lengths=torch.tensor(lengths),
        engine_logprobs=torch.zeros(tokens),
        advantages=torch.tensor(advantages),
        sequences=tuple(TrainingSequence(Prompt("s", ()), None, each, i) for i, each in enumerate(responses)),
    )


@pytest.mark.parametrize("implementation", ["auto", "cached_grad", "fused", "recompute"])
@pytest.mark.parametrize("options", [DivergenceConfig("jsd", beta=0.3), DivergenceConfig("forward_topk", k=3)])
def test_divergence_and_weights_reach_the_loss(options: DivergenceConfig, implementation: Any) -> None:
    """Catches a constant of the configuration that the loss never sees."""
    batch = batch_of([4, 2])
    hidden, weight, other = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
    config = ObjectiveConfig(
        divergence=options,
        token_weights=TokenWeightsConfig("remaining*position", gamma=0.7, beta=1.5),
        policy_gradient=PolicyGradientConfig(enabled=False),
        implementation=implementation,
    )
    leaf = hidden[:6].clone().requires_grad_()
    loss = microbatch_loss(config, GlobalCounts(2, 1), batch, leaf, weight, other[:6], weight, 11, None)
    kind: dict[str, Any] = {"kind": options.kind, "beta": 0.3, "k": 3}
    stats = divergence_from_hidden(hidden[:6], weight, other[:6], weight, batch.target_ids, vocab_size=11, **kind)
    weights = token_weights(stats.kl, batch.cu_seqlens, config.token_weights)
    torch.testing.assert_close(loss.token, (weights * stats.kl).sum() / 2)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "policy",
    [
        PolicyGradientConfig(),
        PolicyGradientConfig(surrogate="clipped", ratio="sequence", normalization="response_mean"),
        PolicyGradientConfig(surrogate="cispo", clip_high=0.1),
    ],
    ids=lambda policy: policy.surrogate,
)
def test_gradients_do_not_depend_on_the_implementation(
    policy: PolicyGradientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a loss that depends on its chunks: CORD's weights, L_seq and its ratios, with an empty response."""
    monkeypatch.setattr(
        output_layer, "CHUNK_ELEMENTS", {"cpu": 3 * 16}
    )  # chunks of at most 3 tokens, or of one longer response
    batch = batch_of([4, 0, 2, 1], [0.5, 0.0, -1.0, 0.5])
    hidden, weight, other = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
    now = token_logprobs_from_hidden(hidden[:7], weight, batch.target_ids, vocab_size=11).student_logprob
    batch = replace(batch, old_logprobs=now + torch.linspace(-0.15, 0.15, 7), engine_logprobs=now)
    calls, terms = [], microbatch_loss_module._terms

    def noted(*arguments: Any) -> Any:
        calls.append(arguments[3])
        return terms(*arguments)

    monkeypatch.setattr(microbatch_loss_module, "_terms", noted)
    gradients, seen = {}, list[torch.Tensor]()
    for implementation in ("cached_grad", "recompute", "fused", "auto"):
        config = ObjectiveConfig(policy_gradient=policy, implementation=implementation)
        leaves = hidden[:7].clone().requires_grad_(), weight.clone().requires_grad_()
        loss = microbatch_loss(config, GlobalCounts(4, 3), batch, leaves[0], leaves[1], other[:7], other, 11, None)
        (8.0 * loss.total).backward()  # type: ignore[no-untyped-call]  # scaled, as the pipeline schedule does
        torch.testing.assert_close(loss.total.detach(), loss.token + loss.sequence)
        gradients[implementation] = [leaf.grad for leaf in leaves]
        if policy.has_ratio:
            assert loss.ratios is not None
            seen.append(torch.cat([loss.ratios.sums, loss.ratios.largest[None]]))
            torch.testing.assert_close(seen[-1], seen[0])
        lengths = {"cached_grad": [7], "recompute": [7]}.get(implementation, [4, 3])
        assert [len(responses.positions) for responses in calls[-len(lengths) :]] == lengths
    assert len(calls) == 6  # each token once
    assert [responses.advantages.tolist() for responses in calls[-2:]] == [[0.5, 0.0], [0.0, -1.0, 0.5]]
    for others in gradients.values():
        for gradient, reference in zip(others, gradients["cached_grad"], strict=True):
            assert gradient is not None and reference is not None and reference.abs().sum() > 0
            torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


def test_the_backend_reaches_the_loss() -> None:
    """Catches a configuration key that nothing reads."""
    hidden, weight = torch.zeros(6, 6), torch.zeros(16, 6)
    config, counts, batch = ObjectiveConfig(backend="triton"), GlobalCounts(2, 1), batch_of([4, 2])
    for teacher_hidden in (hidden, None):
        with pytest.raises(CordError, match="backend triton"):
            microbatch_loss(config, counts, batch, hidden, weight, teacher_hidden, weight, 11, None)


def test_unknown_token_weights_are_refused() -> None:
    """Catches a misspelt factor that only fails when the first step is trained."""
    with pytest.raises(CordError, match="token weights 'entropie' are unknown"):
        TokenWeightsConfig("cord*entropie")


def test_hidden_states_survive_the_way_to_the_host() -> None:
    """Catches a copy of another type or order."""
    rows = torch.randn(5, 3, dtype=torch.float64).to(torch.bfloat16).T
    copied = to_host(rows)
    assert torch.equal(copied, rows) and copied.device.type == "cpu" and copied.dtype == torch.bfloat16
