"""Token weights, against loops that follow the formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

from megatron_cord.errors import CordError
from megatron_cord.losses import TOKEN_WEIGHTS, TokenWeightsConfig, cord_token_weights, token_weights
from tests.gloo import run_ranks

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
    """Catches a top-K over the whole pack, ties in no fixed order, empty responses, T = 1 and T ≤ K."""
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


def everything(name: str, sequences: list[list[float]], entropies: list[list[float]], **options: float) -> torch.Tensor:
    kl, borders = pack(sequences)
    numbers = pack(entropies)[0]
    return token_weights(kl, borders, TokenWeightsConfig(name, **options), entropy=numbers, log_ratio=numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_no_gradient_and_the_same_type(name: str) -> None:
    """Catches a gradient through the weights, and weights that promote the loss to another type."""
    kl = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for dtype in (torch.float64, torch.float32):
        given: dict[str, Any] = {"entropy": kl.to(dtype), "log_ratio": kl.to(dtype)}
        weights = token_weights(kl.to(dtype), torch.tensor([0, 2, 5]), TokenWeightsConfig(name), **given)
        assert not weights.requires_grad and weights.dtype == dtype and weights.shape == (5,)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_no_tokens(name: str) -> None:
    """Catches a failure on an empty microbatch."""
    none = torch.zeros(0)
    given: dict[str, Any] = {"entropy": none, "log_ratio": none}
    assert token_weights(none, torch.tensor([0]), TokenWeightsConfig(name), **given).shape == (0,)


def test_uniform_weights() -> None:
    """Catches anything but ones."""
    assert everything("uniform", [[0.3, 0.2, 9.0]], [[0.0] * 3]).tolist() == [1.0, 1.0, 1.0]


def test_a_fraction_of_each_response_is_kept() -> None:
    """Catches a fraction of the whole batch, entropy taken for divergence, and a response of which nothing is kept."""
    kl, entropy = [[1.0, 5.0, 3.0, 4.0], [2.0], [7.0, 8.0]], [[4.0, 1.0, 3.0, 2.0], [0.0], [1.0, 0.0]]
    assert everything("top_fraction", kl, entropy, keep=0.5).tolist() == [0, 1, 0, 1, 1, 0, 1]
    assert everything("entropy", kl, entropy, keep=0.5).tolist() == [1, 0, 1, 0, 1, 1, 0]
    assert everything("entropy", kl, entropy, keep=1.0).tolist() == [1] * 7
    assert (
        everything("top_fraction", [[float(i) for i in range(10)]], [[0.0] * 10], keep=0.2).sum() == 2
    )  # not 3: 0.2 · 10 is 2


def test_tip_keeps_what_is_large_in_either() -> None:
    """Catches a product where the paper has h + d − h·d, and a normalisation over the batch."""
    kl, entropy = [[0.0, 10.0, 4.0, 4.0]], [[1.0, 0.0, 0.4, 0.5]]
    assert everything("tip", kl, entropy, keep=0.5).tolist() == [1, 1, 0, 0]
    assert everything("tip", kl, entropy, keep=0.75).tolist() == [1, 1, 0, 1]
    # Alone, the second response is normalised by itself; one without any spread scores 0.
    assert everything("tip", [[9.0, 9.5], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], keep=0.5).tolist() == [0, 1, 1, 0]


@given(sequences=SEQUENCES)
def test_remaining_equals_the_loop(sequences: list[list[float]]) -> None:
    """Catches a sum that runs over the borders of responses or includes the token itself, and 0 / 0."""
    sequences = [[min(value, 4.0) for value in sequence] for sequence in sequences]
    expected = [
        1 + 0.5 * (1 - (sum(sequence[:t]) / sum(sequence) if sum(sequence) > 0 else 0.0))
        for sequence in sequences
        for t in range(len(sequence))
    ]
    torch.testing.assert_close(everything("remaining", sequences, sequences), torch.tensor(expected))


def test_importance_weights_are_those_of_the_prefix() -> None:
    """Catches a ratio of the token itself, of another response's tokens, a cap on single factors, a broken engine.

    With the loop, and that E_μ[w_t D_t] = E_p[D_t]: over all responses of three tokens of two policies.
    """
    ratios = [[0.3, -0.1, 2.0, -3.0], [], [-0.5, 9.0, 1.0]]
    kl, borders = pack([[1.0] * len(each) for each in ratios])
    config = TokenWeightsConfig("importance", importance_cap=4.0)
    weights = token_weights(kl.double(), borders, config, log_ratio=pack(ratios)[0].double())
    expected = [min(math.exp(sum(each[:t])), 4.0) for each in ratios for t in range(len(each))]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))

    generator = torch.Generator().manual_seed(0)
    p, mu = (torch.rand(4, 2, generator=generator, dtype=torch.float64).softmax(1) for _ in range(2))  # by prefix state
    divergence = torch.rand(4, generator=generator, dtype=torch.float64)
    on, off = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for response in itertools.product(range(2), repeat=3):
        states = [0, 1 + response[0], 3]
        logs = [torch.stack([q[s, y] for s, y in zip(states, response, strict=True)]).log() for q in (p, mu)]
        uncapped = TokenWeightsConfig("importance", importance_cap=1e9)
        w = token_weights(divergence[states], torch.tensor([0, 3]), uncapped, log_ratio=logs[0] - logs[1])
        on += logs[0].sum().exp() * divergence[states]
        off += logs[1].sum().exp() * w * divergence[states]
    torch.testing.assert_close(off, on)
    broken = token_weights(kl, borders, config, log_ratio=torch.full((7,), torch.nan))
    assert broken.isnan().any()


def test_infinite_divergences_leave_numbers() -> None:
    """Catches inf / inf: an infinite divergence is the largest, and the weights stay numbers."""
    kl = [[0.5, float("inf"), 1.0, float("nan")]]
    for name in TOKEN_WEIGHTS:
        assert everything(name, kl, [[1.0, 2.0, 3.0, 4.0]]).isfinite().all()
    assert everything("remaining", kl, kl).tolist()[2:] == [1.25, 1.25]


def test_factors_multiply() -> None:
    """Catches a product that takes the last factor only, and cord that is not top_k times position."""
    kl, entropy = [[0.1, 0.9, 0.3], [0.2, 0.4]], [[1.0, 2.0, 3.0], [1.0, 2.0]]
    product = everything("entropy * remaining*cord", kl, entropy, top_k=1)
    single = [everything(name, kl, entropy, top_k=1) for name in ("entropy", "remaining", "top_k", "position")]
    torch.testing.assert_close(product, torch.stack(single).prod(0))


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
@pytest.mark.parametrize("cu_seqlens", [[0, 2], [1, 3], [0, 2, 1, 3], [], [0, 4]])
def test_wrong_cu_seqlens_are_refused(name: str, cu_seqlens: list[int]) -> None:
    """Catches sequence borders of another pack."""
    with pytest.raises(CordError, match="cu_seqlens must"):
        token_weights(torch.zeros(3), torch.tensor(cu_seqlens, dtype=torch.int64), TokenWeightsConfig(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0, but is -1"),
        ({"alpha": 0.0}, "alpha and beta must be positive, but are 0.0 and 2.0"),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\], but is 0.0"),
        ({"gamma": -1.0}, "gamma must be at least 0, but is -1.0"),
        ({"factors": "cord*chord"}, "token weights 'chord' are unknown; choose from uniform, cord, top_k, position"),
        ({"factors": ""}, "token weights '' are unknown"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Catches nonsense from a configuration file."""
    with pytest.raises(CordError, match=message):
        TokenWeightsConfig(**options)


def test_missing_inputs_are_named() -> None:
    """Catches weights by entropy without one."""
    with pytest.raises(CordError, match="token weights tip need the student's entropy"):
        token_weights(torch.zeros(3), torch.tensor([0, 3]), TokenWeightsConfig("tip"))
    with pytest.raises(CordError, match="token weights importance need log_ratio"):
        token_weights(torch.zeros(3), torch.tensor([0, 3]), TokenWeightsConfig("importance"))
    with pytest.raises(CordError, match=r"entropy has shape \[2\], but kl \[3\]"):
        token_weights(torch.zeros(3), torch.tensor([0, 3]), TokenWeightsConfig("tip"), entropy=torch.zeros(2))


def spread(rank: int) -> list[Any]:
    """Return the weights by every factor of tokens spread over two ranks, and the errors of positions with a gap."""
    kl, entropy, borders, owner = spread_inputs()
    mine = (owner == rank).nonzero().squeeze(1)
    sequence = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff())
    position = torch.arange(len(kl)) - borders[sequence]
    local = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.bincount(sequence[mine], minlength=len(borders) - 1).cumsum(0)]
    )
    given = {"entropy": entropy[mine], "log_ratio": entropy[mine] - 0.5}
    options: dict[str, Any] = given | {"positions": position[mine], "cp_group": dist.group.WORLD}
    weights = [token_weights(kl[mine], local, TokenWeightsConfig(name, top_k=2), **options) for name in TOKEN_WEIGHTS]
    messages = []
    for change in ({"positions": position[mine] + 1}, {"positions": None}):
        try:
            token_weights(kl[mine], local, TokenWeightsConfig(), **(options | change))
        except CordError as error:
            messages.append(str(error))
    return [weights, messages]


def spread_inputs() -> tuple[torch.Tensor, ...]:
    """Return kl, entropy, cu_seqlens and each token's rank: a zigzag, a sequence on one rank alone, an empty one."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    return (
        torch.rand(13, generator=generator),
        torch.rand(13, generator=generator),
        torch.tensor([0, 8, 11, 11, 13]),
        owner,
    )


def test_context_parallel_ranks_get_the_weights_of_whole_responses() -> None:
    """Catches positions and sums over a rank's own part of a response, and tokens that come back in another order."""
    kl, entropy, borders, owner = spread_inputs()
    results = run_ranks(spread, 2)
    for index, name in enumerate(TOKEN_WEIGHTS):
        expected = token_weights(
            kl, borders, TokenWeightsConfig(name, top_k=2), entropy=entropy, log_ratio=entropy - 0.5
        )
        for rank in range(2):
            torch.testing.assert_close(results[rank][0][index], expected[owner == rank])
    for _, messages in results:
        gap, missing = messages
        assert gap == "positions of sequence 0 are not 0 … 7 over the context-parallel ranks"
        assert missing.startswith("positions is needed with cp_group")
