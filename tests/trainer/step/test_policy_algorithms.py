"""Named algorithms (docs/algorithms.md): their losses equal TRL's, denominators and filters included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.losses import PolicyGradientConfig
from megatron_cord.losses.policy_loss import PolicyTokens, policy_loss
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.packing import split_minibatches
from megatron_cord.trainer.step.objective import GlobalCounts, ObjectiveConfig

TRL: dict[str, Any] = json.loads((Path(__file__).parents[3] / "benchmarks/results/policy_losses_trl.json").read_text())


@pytest.mark.parametrize("name", TRL["cases"])
def test_the_loss_is_trls(name: str) -> None:
    """Catches another denominator, clipping, ratio or weight than TRL's; its numbers are by its own method."""
    case, lengths = TRL["cases"][name], TRL["lengths"]
    config = ObjectiveConfig(
        policy_gradient=PolicyGradientConfig(importance_cap=TRL["importance_cap"], **case["policy_gradient"])
    )
    rollouts = [
        ScoredRollout(
            Rollout("s", (0,) * length, (0.0,) * length, "length" if i in TRL["truncated"] else "stop", (), ""),
            "policy",
            draw=1 + i,
            advantage=advantage,
        )
        for i, (length, advantage) in enumerate(zip(lengths, TRL["numbers"]["advantages"], strict=True))
    ]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    student, old, engine = (
        torch.tensor(TRL["numbers"][key], dtype=torch.float64)[mask] for key in ("student", "old", "engine")
    )
    student.requires_grad_()
    advantages = torch.tensor([0.0 if config.filters(r) else r.advantage for r in rollouts], dtype=torch.float64)
    tokens = PolicyTokens(
        student, old, engine, torch.tensor([0, *lengths]).cumsum(0), torch.tensor(lengths), advantages
    )
    count = GlobalCounts.of(config, rollouts, TRL["max_length"]).policy
    loss, _ = policy_loss(config.policy_gradient, tokens, count)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-10)
    wanted = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted[mask], rtol=1e-10, atol=1e-14)


def scored(role: Any, position: int, draw: int, length: int = 3, *, cut: bool = False) -> ScoredRollout:
    rollout = Rollout(f"s{position}", (7,) * length, (0.0,) * length, "length" if cut else "stop", (), "")
    return ScoredRollout(rollout, role, position=position, draw=draw)


def test_what_a_loss_is_divided_by() -> None:
    """Catches replaced groups that are counted, and tokens of filtered responses that are."""
    rollouts = [
        *(scored("distill", 0, 0, 4), scored("distill", 1, 0, 2)),
        *(scored("policy", 0, 1, 5), scored("policy", 0, 2, 8, cut=True)),
        *(scored("replaced", 1, 1, 3), scored("replaced", 1, 2, 3)),
    ]
    expected = {
        ("response", "objective"): (2, 2),
        ("response", "response"): (2, 2),
        ("response", "response_mean"): (2, 2),
        ("response", "token"): (2, 13),
        ("response", "max_length"): (2, 16),
        ("token", "objective"): (6, 13),
        ("token", "response"): (6, 2),
    }
    for (normalization, own), counts in expected.items():
        policy = PolicyGradientConfig(normalization=own)  # type: ignore[arg-type]
        config = ObjectiveConfig(normalization=normalization, policy_gradient=policy)  # type: ignore[arg-type]
        assert GlobalCounts.of(config, rollouts, 8) == GlobalCounts(*counts)
    filtering = ObjectiveConfig(policy_gradient=PolicyGradientConfig(normalization="token", filter_truncated=True))
    assert GlobalCounts.of(filtering, rollouts, 8) == GlobalCounts(2, 5)
    assert GlobalCounts.of(filtering, [], 8) == GlobalCounts(1, 1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_minibatches_share_the_step(count: int) -> None:
    """Catches a rollout in two mini-batches or none, a group that is torn, and groups that are all in the first."""
    groups = [(p, d) for p in (0, 2, 5) for d in (1, 2)]
    rollouts = [scored("distill", p, 0) for p in range(6)]
    rollouts += [scored("replaced" if p == 2 else "policy", p, d) for p, d in [*groups, (7, 1), (7, 2)]]
    parts = split_minibatches(rollouts, count)
    kept = [i for i, r in enumerate(rollouts) if r.role != "replaced"]
    assert sorted(i for part in parts for i in part) == kept and all(part == sorted(part) for part in parts)
    for part in parts:
        assert sum(rollouts[i].role == "distill" for i in part) == 6 // count
        assert len({rollouts[i].position for i in part if rollouts[i].draw}) >= 3 // count
    owner = {i: number for number, part in enumerate(parts) for i in part}
    for position in (0, 5, 7):
        assert len({owner[i] for i in kept if rollouts[i].draw and rollouts[i].position == position}) == 1
    if count > 2:
        return
    assert [len(part) for part in split_minibatches(rollouts[:1], 2)] == [1, 0]
