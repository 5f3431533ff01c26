"""L_seq's surrogates against loops that follow the formulas, on one rank and shared by two."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses import PolicyGradientConfig
from megatron_cord.losses.policy_loss import PolicyTokens, RatioStats, policy_loss
from tests.gloo import run_ranks

LENGTHS = [5, 1, 6, 4]
COUNT = 9
CONFIGS = [
    PolicyGradientConfig(
        surrogate=surrogate,  # type: ignore[arg-type]
        ratio=ratio,  # type: ignore[arg-type]
        normalization=normalization,  # type: ignore[arg-type]
        clip_low=0.1,
        clip_high=0.15,
        importance_cap=1.3,
    )
    for surrogate, ratio, normalization in itertools.product(
        ("reinforce", "clipped", "cispo"), ("token", "sequence"), ("objective", "response_mean")
    )
    if (surrogate, ratio) != ("reinforce", "sequence")
]


def numbers() -> dict[str, Tensor]:
    """Log-probabilities [N] with ratios on both sides of the bounds, and advantages of both signs and zero."""
    generator = torch.Generator().manual_seed(3)
    old = -2 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    shift = torch.repeat_interleave(torch.tensor([0.5, 0.0, 0.0, -0.2], dtype=torch.float64), torch.tensor(LENGTHS))
    return {
        "student": old + 0.3 * torch.randn(len(old), generator=generator, dtype=torch.float64) + shift,
        "old": old,
        "engine": old + 0.4 * torch.randn(len(old), generator=generator, dtype=torch.float64),
        "advantages": torch.tensor([0.75, -0.5, 0.0, -1.25], dtype=torch.float64),
    }


def computed(
    config: PolicyGradientConfig, given: dict[str, Tensor], mine: Tensor, group: Any = None
) -> tuple[Tensor, Tensor, RatioStats | None]:
    """Loss, its gradient by the log-probabilities, and the ratios, of the tokens ``mine`` of all."""
    response = torch.repeat_interleave(torch.tensor(LENGTHS))[mine]
    student = given["student"][mine].clone().requires_grad_()
    borders = torch.nn.functional.pad(response.bincount(minlength=len(LENGTHS)).cumsum(0), (1, 0))
    tokens = PolicyTokens(
        student, given["old"][mine], given["engine"][mine], borders, torch.tensor(LENGTHS), given["advantages"]
    )
    loss, ratios = policy_loss(config, tokens, COUNT, cp_group=group)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient, ratios


def expected(config: PolicyGradientConfig, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[float]]:
    """Return the same by loops over tokens, with autograd through the whole sequence ratio; and what is counted."""
    student = given["student"].clone().requires_grad_()
    loss, start = torch.zeros((), dtype=torch.float64), 0
    counted = [0.0, 0.0, 0.0, 0.0, 0.0]  # tokens, ratios, clipped low, clipped high, the largest ratio
    for length, advantage in zip(LENGTHS, given["advantages"].tolist(), strict=True):
        here = range(start, start + length)
        whole = torch.stack([student[t] - given["old"][t] for t in here]).mean().exp()
        weights = [min(float((given["old"][t] - given["engine"][t]).exp()), config.importance_cap) for t in here]
        for t, weight in zip(here, weights, strict=True):
            ratio = whole if config.ratio == "sequence" else (student[t] - given["old"][t]).exp()
            low, high = 1 - config.clip_low, 1 + config.clip_high
            if config.surrogate == "reinforce":
                behind = float((student[t] - given["engine"][t]).detach().exp())
                term = -min(behind, config.importance_cap) * advantage * student[t]
            elif config.surrogate == "cispo":
                term = -weight * min(float(ratio.detach()), high) * advantage * student[t]
            else:
                bounded = ratio.clamp(low, high)
                smaller = ratio if ratio.item() * advantage <= bounded.item() * advantage else bounded
                factor = sum(weights) / length if config.ratio == "sequence" else weight
                term = -factor * smaller * advantage
            loss = loss + term / (length if config.normalization == "response_mean" else 1) / COUNT
            if advantage != 0:
                value = ratio.item()
                counted[0] += 1
                counted[1] += value
                counted[2] += config.surrogate == "clipped" and value < low and advantage < 0
                counted[3] += value > high and (config.surrogate == "cispo" or advantage > 0)
                counted[4] = max(counted[4], value)
        start += length
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient, counted


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.surrogate}-{c.ratio}-{c.normalization}")
def test_loss_gradient_and_ratios_equal_the_loop(config: PolicyGradientConfig) -> None:
    """Catches a min that is a max, bounds on the wrong side, a ratio over wrong tokens, and a weight with gradient."""
    given = numbers()
    loss, gradient, ratios = computed(config, given, torch.arange(sum(LENGTHS)))
    wanted_loss, wanted_gradient, counted = expected(config, given)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-14)
    if config.surrogate == "reinforce":
        assert ratios is None
    else:
        assert ratios is not None and counted[2] + counted[3] > 0
        assert [*ratios.sums.tolist(), float(ratios.largest)] == pytest.approx(counted)


def test_two_ranks_share_the_responses() -> None:
    """Catches a sequence ratio, or a mean over a response, of a context-parallel rank's own tokens only."""
    shares = run_ranks(share_of, 2)
    for config, parts in zip(CONFIGS, zip(*shares, strict=True), strict=True):
        loss, gradient, ratios = computed(config, numbers(), torch.arange(sum(LENGTHS)))
        torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=1e-14)
        together = torch.empty_like(gradient)
        for mine, part in zip(SHARES, parts, strict=True):
            together[mine] = part[1]
        torch.testing.assert_close(together, gradient, rtol=1e-12, atol=1e-14)
        if ratios is not None:
            merged = parts[0][2].merged(parts[1][2])
            torch.testing.assert_close(merged.sums, ratios.sums)
            assert merged.largest == ratios.largest


#: the second rank has nothing of the second response
SHARES = [
    torch.tensor([0, 1, 5, 8, 9, 12, 15]),
    torch.tensor([2, 3, 4, 6, 7, 10, 11, 13, 14]),
]


def share_of(rank: int) -> list[tuple[Tensor, Tensor, RatioStats | None]]:
    """Compute all CONFIGS on one of two ranks."""
    return [computed(config, numbers(), SHARES[rank], dist.group.WORLD) for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS[2:], ids=lambda c: f"{c.surrogate}-{c.ratio}-{c.normalization}")
def test_a_single_update_is_the_policy_gradient(config: PolicyGradientConfig) -> None:
    """Catches a first update, where every ratio is 1, that differs from A log p by more than its weight."""
    given = numbers()
    student = given["student"].clone().requires_grad_()
    borders, lengths = torch.tensor([0, *LENGTHS]).cumsum(0), torch.tensor(LENGTHS)
    gradients = []
    for surrogate in (config, PolicyGradientConfig(normalization=config.normalization)):
        tokens = PolicyTokens(student, None, student.detach(), borders, lengths, given["advantages"])
        loss, _ = policy_loss(surrogate, tokens, COUNT)
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_an_engine_without_logprobs_makes_a_broken_loss() -> None:
    """Catches NaN of an engine whose weights overflowed that goes unnoticed, as old log-probabilities are finite."""
    given = numbers()
    given["engine"][3] = torch.nan
    for config in CONFIGS:
        assert computed(config, given, torch.arange(sum(LENGTHS)))[0].isnan()


def test_no_tokens() -> None:
    """Catches a failure on a rank without a response token."""
    none = torch.zeros(0)
    for config in CONFIGS:
        tokens = PolicyTokens(none, none, none, torch.tensor([0]), none.long(), none)
        loss, ratios = policy_loss(config, tokens, 1)
        assert loss == 0 and (ratios is None or ratios.sums.tolist() == [0.0] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.0}, r"clip_low must lie in \[0, 1\)"),
        ({"clip_high": -0.1}, "clip_high be at least 0"),
        ({"ratio": "sequence"}, "ratio=sequence needs a surrogate that has a ratio"),
        ({"importance_cap": 0.0}, "importance_cap must be positive"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    """Catches bounds that clip everything, and a ratio that no term reads."""
    with pytest.raises(CordError, match=message):
        PolicyGradientConfig(**options)
