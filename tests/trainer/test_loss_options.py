"""The objective's choices that reach the loss: every divergence, every implementation, composed token weights, hidden states on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.losses import divergence_from_hidden, token_weights
from megatron_cord.model.lalm import ModelInput
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer import teacher
from megatron_cord.trainer.batches import Microbatch, Rows, TrainingSequence
from megatron_cord.trainer.objective import GlobalCounts, ObjectiveConfig, microbatch_loss


def batch_of(lengths: list[int]) -> Microbatch:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    nothing = ModelInput(torch.zeros(1, 1, dtype=torch.int64), None, None, ())
    rollout = Rollout("s", (), (), "stop", (), "")
    return Microbatch(
        student=nothing,
        student_rows=Rows(torch.arange(tokens), None),
        teacher=nothing,
        teacher_rows=Rows(torch.arange(tokens), None),
        target_ids=torch.randint(0, 11, (tokens,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        engine_logprobs=torch.zeros(tokens),
        advantages=torch.zeros(len(lengths)),
        sequences=tuple(TrainingSequence(Prompt("s", ()), None, rollout, True, 0.0, i) for i in range(len(lengths))),
    )


@pytest.mark.parametrize("implementation", ["auto", "late", "recompute"])
@pytest.mark.parametrize("options", [{"divergence": "jsd", "jsd_beta": 0.3}, {"divergence": "topk", "vocabulary_top_k": 3}])
def test_divergence_and_weights_reach_the_loss(options: dict[str, Any], implementation: Any) -> None:
    """Catches a constant of the configuration that the loss never sees."""
    batch = batch_of([4, 2])
    hidden, weight, other = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
    config = ObjectiveConfig(
        **options, token_weights="remaining*position", gamma=0.7, beta=1.5, policy_gradient=False, implementation=implementation
    )
    leaf = hidden[:6].clone().requires_grad_()
    loss = microbatch_loss(config, GlobalCounts(2, 1), batch, leaf, weight, other[:6], weight, 11, None)
    kind = {"kind": options["divergence"], "beta": 0.3, "k": 3}
    stats = divergence_from_hidden(hidden[:6], weight, other[:6], weight, batch.target_ids, vocab_size=11, **kind)
    weights = token_weights(stats.kl, batch.cu_seqlens, config.weighting)
    torch.testing.assert_close(loss.token.detach(), (weights * stats.kl).sum() / 2)
    assert config.weighting.gamma == 0.7 and config.weighting.names == ("remaining", "position")
    loss.token.backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_unknown_token_weights_are_refused() -> None:
    """Catches a misspelt factor that only fails when the first step is trained."""
    with pytest.raises(CordError, match="token weights 'entropie' are unknown"):
        ObjectiveConfig(token_weights="cord*entropie")


def test_hidden_states_survive_the_way_to_the_host() -> None:
    """Catches a copy of another type or order."""
    rows = torch.randn(5, 3, dtype=torch.float64).to(torch.bfloat16).T
    copied = teacher._on_host(rows)
    assert torch.equal(copied, rows) and copied.device.type == "cpu" and copied.dtype == torch.bfloat16
