"""Advantages, importance weights and L_seq, against loops that follow the formulas."""

from __future__ import annotations

import math
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megatron_cord.errors import CordError
from megatron_cord.losses import (
    group_advantages,
    has_reward_variance,
    truncated_importance_weights,
)
from megatron_cord.losses.cord import sequence_loss

RESPONSES = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([-7, 0, 3])), min_size=1, max_size=12)


@given(responses=RESPONSES, normalize_std=st.booleans())
def test_advantages_equal_the_loop(responses: list[tuple[float, int]], normalize_std: bool) -> None:
    """Catches mixed-up groups that are not contiguous, and an unwanted division by the standard deviation."""
    expected, signal = [], []
    for reward, name in responses:
        group = [other for other, other_name in responses if other_name == name]
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((other - mean) ** 2 for other in group) / len(group))
        signal.append(max(group) > min(group))
        expected.append(0.0 if not signal[-1] else (reward - mean) / (deviation if normalize_std else 1.0))
    rewards = torch.tensor([reward for reward, _ in responses], dtype=torch.float64)
    group_ids = torch.tensor([name for _, name in responses])
    torch.testing.assert_close(
        group_advantages(rewards, group_ids, normalize_std=normalize_std),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
    )
    assert has_reward_variance(rewards, group_ids).tolist() == signal


def test_equal_rewards_have_exactly_no_advantage() -> None:
    """Catches rounding of the mean that leaves 1e-9, which a division by the standard deviation would blow up."""
    for size in range(1, 12):  # at some of these the mean of 0.1 is not 0.1 in float32
        rewards, group_ids = torch.full((size,), 0.1), torch.zeros(size, dtype=torch.int64)
        for normalize_std in (False, True):
            assert group_advantages(rewards, group_ids, normalize_std=normalize_std).tolist() == [0.0] * size


def test_integer_rewards() -> None:
    """Catches integer division of the mean."""
    assert group_advantages(torch.tensor([1, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)).tolist() == [
        0.75,
        -0.25,
        -0.25,
        -0.25,
    ]


def test_bad_rewards_are_refused() -> None:
    """Catches a reward that would make a whole group NaN, and rewards of another batch."""
    with pytest.raises(CordError, match=r"rewards\[1\] is nan"):
        group_advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(CordError, match=r"same shape \[responses\], but have \[2\] and \[3\]"):
        has_reward_variance(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_equal_the_loop(weighted: bool) -> None:
    """Catches a wrong sign, a mean over tokens where the paper sums, and a gradient through weights or advantages."""
    generator = torch.Generator().manual_seed(0)
    logprob = (-torch.rand(7, generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(7, generator=generator, dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([0.75, -0.25, 0.5]).requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # the second response is empty
    loss = sequence_loss(logprob, cu_seqlens, advantages, 5, importance_weights=weights if weighted else None)
    factors = weights.detach() if weighted else torch.ones(7, dtype=torch.float64)
    terms = factors * logprob.detach()
    torch.testing.assert_close(loss.detach(), (-0.75 * terms[:3].sum() - 0.5 * terms[3:].sum()) / 5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None and weights.grad is None and advantages.grad is None
    torch.testing.assert_close(logprob.grad, -factors * torch.tensor([0.75] * 3 + [0.5] * 4) / 5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_equal_the_loop(level: Literal["token", "sequence"]) -> None:
    """Catches a ratio upside down, a cap that is a floor, a product over wrong tokens, and overflow before the cap."""
    student = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64).requires_grad_()
    engine = torch.tensor([-1.5, -1.0, -0.7, -5000.0], dtype=torch.float64)
    weights = truncated_importance_weights(student, engine, torch.tensor([0, 2, 3, 4]), cap=1.5, level=level)
    expected = (
        [1.5, math.exp(-1.0), math.exp(0.2), 1.5] if level == "token" else [math.exp(-0.5)] * 2 + [math.exp(0.2), 1.5]
    )
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_no_responses() -> None:
    """Catches a failure on an empty microbatch."""
    none = torch.zeros(0)
    assert group_advantages(none, none.long()).shape == (0,)
    assert has_reward_variance(none, none.long()).shape == (0,)
    assert sequence_loss(none, torch.tensor([0]), none, 1, importance_weights=none) == 0
    assert truncated_importance_weights(none, none, torch.tensor([0]), level="sequence").shape == (0,)


def test_bad_arguments_are_named() -> None:
    """Catches tensors of another batch, and an engine that left a token's log-probability out."""
    zeros, borders = torch.zeros(3), torch.tensor([0, 1, 3])
    with pytest.raises(CordError, match=r"advantages must have shape \[2\].* has \[3\]"):
        sequence_loss(zeros, borders, zeros, 1)
    with pytest.raises(CordError, match=r"importance_weights has shape \[2\], but student_logprob \[3\]"):
        sequence_loss(zeros, borders, zeros[:2], 1, importance_weights=zeros[:2])
    with pytest.raises(CordError, match=r"cu_seqlens must rise from 0 to 3"):
        sequence_loss(zeros, torch.tensor([0, 1, 2]), zeros[:2], 1)
    with pytest.raises(CordError, match=r"engine_logprob has shape \[2\], but student_logprob \[3\]"):
        truncated_importance_weights(zeros, zeros[:2], borders)
    with pytest.raises(CordError, match=r"engine_logprob\[2\] is NaN"):
        truncated_importance_weights(zeros, torch.tensor([0.0, 0.0, math.nan]), borders)
    with pytest.raises(CordError, match=r"importance cap must be positive, but is 0\.0"):
        truncated_importance_weights(zeros, zeros, borders, cap=0.0)
    with pytest.raises(CordError, match="importance level 'word' is unknown"):
        truncated_importance_weights(zeros, zeros, borders, level="word")  # type: ignore[arg-type]
