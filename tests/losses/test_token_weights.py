"""Token weights, against loops that follow the formulas."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megatron_cord.errors import CordError
from megatron_cord.losses import TOKEN_WEIGHTS, cord_token_weights, token_weights_named, uniform_token_weights

# Few different values, so that ties are common.
SEQUENCES = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]), max_size=8), min_size=1, max_size=5)


def slow_weights(sequence: list[float], top_k: int, alpha: float, beta: float) -> list[float]:
    """w_t of one response, as the paper writes it; of equal divergences the earlier one first."""
    length = len(sequence)
    top = sorted(range(length), key=lambda t: (-sequence[t], t))[:top_k]
    position = [beta - (beta - 1) * (t / (length - 1) if length > 1 else 0.0) for t in range(length)]
    return [(alpha if t in top else 1.0) * position[t] for t in range(length)]


def pack(sequences: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return torch.tensor([value for sequence in sequences for value in sequence]), lengths.cumsum(0).to(torch.int32)


@given(
    sequences=SEQUENCES,
    top_k=st.integers(0, 9),
    alpha=st.sampled_from([0.5, 1.0, 2.0]),
    beta=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_cord_weights_equal_the_loop(sequences: list[list[float]], top_k: int, alpha: float, beta: float) -> None:
    """Catches a top-K over the whole pack instead of each response, ties in no fixed order, empty responses, T = 1 and T ≤ K."""
    expected = [weight for sequence in sequences for weight in slow_weights(sequence, top_k, alpha, beta)]
    weights = cord_token_weights(*pack(sequences), top_k=top_k, alpha=alpha, beta=beta)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_cord_defaults_are_the_papers() -> None:
    """Catches a default that drifts: K = 20, α = 2, β = 2."""
    kl = torch.arange(30.0)
    weights = cord_token_weights(kl, torch.tensor([0, 30]))
    assert weights[0] == 2.0 and weights[-1] == 2.0  # 1 · β first, α · 1 last
    expected = slow_weights(kl.tolist(), 20, 2.0, 2.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_a_single_token() -> None:
    """Catches 0 / 0 in the position weight."""
    assert cord_token_weights(torch.tensor([0.3]), torch.tensor([0, 1])).tolist() == [4.0]


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_no_gradient_and_the_same_type(name: str) -> None:
    """Catches a gradient through the weights, and weights that promote the loss to another type."""
    kl = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = token_weights_named(name)(kl, torch.tensor([0, 2, 5]))
    assert not weights.requires_grad and weights.dtype == torch.float64 and weights.shape == (5,)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_no_tokens(name: str) -> None:
    """Catches a failure on an empty microbatch."""
    assert token_weights_named(name)(torch.zeros(0), torch.tensor([0])).shape == (0,)


def test_uniform_weights() -> None:
    """Catches anything but ones."""
    assert uniform_token_weights(torch.rand(3), torch.tensor([0, 3])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
@pytest.mark.parametrize("cu_seqlens", [[0, 2], [1, 3], [0, 2, 1, 3], [], [0, 4]])
def test_wrong_cu_seqlens_are_refused(name: str, cu_seqlens: list[int]) -> None:
    """Catches sequence borders of another pack."""
    with pytest.raises(CordError, match="cu_seqlens must"):
        token_weights_named(name)(torch.zeros(3), torch.tensor(cu_seqlens, dtype=torch.int64))


def test_wrong_options_are_refused() -> None:
    """Catches nonsense from a configuration file."""
    kl, borders = torch.zeros(3), torch.tensor([0, 3])
    with pytest.raises(CordError, match="top_k must be at least 0, but is -1"):
        cord_token_weights(kl, borders, top_k=-1)
    with pytest.raises(CordError, match="alpha and beta must be positive, but are 0.0 and 2.0"):
        cord_token_weights(kl, borders, alpha=0.0)
    with pytest.raises(CordError, match="token weights 'chord' are unknown; choose one of cord, uniform"):
        token_weights_named("chord")
