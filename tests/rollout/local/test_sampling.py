"""Sampling: the distributions that tokens are drawn from, and what the draws depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.local import sampling
from megatron_cord.rollout.local.philox import gumbel
from megatron_cord.rollout.local.sampling import Sampler, gumbel_max, likeliest
from megatron_cord.rollout.types import GenerationRequest

CPU = torch.device("cpu")
VOCABULARY = 700  #: ten whole parts of 64, and some of one


def request(number: int, temperature: float = 1.0, *, seed: int = 0, top_p: float = 1.0) -> GenerationRequest:
    return GenerationRequest(Prompt(f"s{number}", (1,)), temperature, 8, seed, top_p)


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def tokens(
    requests: Sequence[GenerationRequest], logits: Tensor, positions: int, forbidden: Sequence[int] = ()
) -> Tensor:
    """Return int64 [positions, B] of the same logits at each position."""
    sampler = Sampler(requests, forbidden, CPU)
    return torch.stack([sampler.choose(logits.clone(), position) for position in range(positions)])


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the statistic's distance from its mean, in standard deviations, with rare tokens as one."""
    rare = expected < 5
    counts, expected = (torch.cat([each[~rare], each[rare].sum()[None]]).double() for each in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_tokens_follow_the_softmax_over_two_levels(temperature: float) -> None:
    """Catches parts with wrong probabilities, numbers that are used for two levels, a last part that is cut off.

    Also a temperature on the wrong side, and forbidden ids that are drawn.
    """
    draws, forbidden = 16_000, [3, 300, 699]
    logits = some_logits(1)
    requests = [request(number, temperature) for number in range(draws // 16)]
    found = tokens(requests, logits.expand(len(requests), -1), 16, forbidden)
    exact = logits[0].double() / temperature
    exact[forbidden] = -math.inf
    counts = torch.bincount(found.flatten(), minlength=VOCABULARY)
    assert not counts[forbidden].any()
    assert abs(chi_square(counts, found.numel() * exact.softmax(-1))) < 4


def test_successive_tokens_are_independent() -> None:
    """Catches numbers that positions, responses or both levels of a draw share: pairs of tokens are then correlated."""
    logits = torch.zeros(600, VOCABULARY)
    logits[:, [0, 100, 300, 600]] = 20.0
    found = tokens([request(number) for number in range(len(logits))], logits, 17)
    kinds = torch.searchsorted(torch.tensor([0, 100, 300, 600]), found)
    for first, second in ((kinds[:-1], kinds[1:]), (kinds[:, :-1], kinds[:, 1:])):
        pairs = torch.bincount((4 * first + second).flatten(), minlength=16)
        assert abs(chi_square(pairs, pairs.sum() / 16 * torch.ones(16))) < 4


def test_a_token_depends_on_its_own_response_alone() -> None:
    """Catches numbers of the batch's row, of the engine's order or size of batch, and of when they are drawn."""
    requests = [request(n, temperature, seed=n % 3) for n, temperature in enumerate([1.0, 0.0, 1.5, 0.7] * 4)]
    logits = some_logits(len(requests))
    together = tokens(requests, logits, 20)
    for rows in ([5], [15, 2, 8], list(reversed(range(len(requests))))):
        assert torch.equal(tokens([requests[row] for row in rows], logits[rows], 20), together[:, rows])
    sampler = Sampler(requests, (), CPU)
    assert torch.equal(sampler.choose(logits.clone(), 19), together[19])  # without the positions before
    assert torch.equal(together[:, 1], logits[1].argmax().expand(20))


def test_greedy_batches_draw_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches noise for reference answers and evaluations, of which nothing is sampled."""

    def refuse(*_: object) -> None:
        raise AssertionError("numbers were drawn")

    monkeypatch.setattr(sampling, "gumbel", refuse)
    logits = some_logits(3)
    logits[1, 5] = 99.0
    found = tokens([request(number, 0.0, top_p=0.5) for number in range(3)], logits, 2, forbidden=[5])
    logits[:, 5] = -math.inf
    assert torch.equal(found, logits.argmax(-1).expand(2, -1))


@pytest.mark.parametrize("vocabulary", [3, 64, 65, 700, 64 * 64 + 1])
def test_level_by_level_is_as_a_slow_one(vocabulary: int) -> None:
    """Compares with a choice number by number in float64; catches an offset within or between parts of any size."""
    levels = sampling._levels(vocabulary)
    numbers = gumbel(torch.arange(40).view(20, 2), range(1), 64 * levels)[0]
    logits = 2 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))
    temperatures = torch.linspace(0.5, 2.0, 20)[:, None]
    drawn = gumbel_max(logits, temperatures, numbers).tolist()
    for row, given, token in zip(
        (logits / temperatures).double().softmax(-1).tolist(), numbers.tolist(), drawn, strict=True
    ):
        inside = range(vocabulary)
        for level in range(levels):
            size = 64 ** (levels - 1 - level)  # tokens of a part
            scores = {
                part: math.log(sum(row[part : min(part + size, inside.stop)])) + given[64 * level + number]
                for number, part in enumerate(range(inside.start, inside.stop, size))
            }
            best = max(scores, key=lambda part: scores[part])
            inside = range(best, min(best + size, inside.stop))
        assert token == inside.start


def kept_by_hand(logits: list[float], top_p: float, top_k: int) -> set[int]:
    """Return the ids that SGLang keeps, one by one: likelier ones sum up to at most p, and are fewer than k."""
    total = math.fsum(math.exp(z) for z in logits)
    kept, before = set[int](), 0.0
    for token in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if before <= top_p and (not top_k or len(kept) < top_k):
            kept.add(token)
        before += math.exp(logits[token]) / total
    return kept


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (0.3, 5), (1.0, 1), (1.0, 1000)])
def test_the_kept_tokens_are_those_of_a_slow_reference(top_p: float, top_k: int) -> None:
    """Catches an off-by-one at either bound, rows with another's bounds, a whole distribution that loses its end."""
    logits = 3 * torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds = torch.full((20,), top_p, dtype=torch.float64), torch.full((20,), top_k or 2**62)
    for row, kept in zip(logits.tolist(), likeliest(logits, *bounds), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == kept_by_hand(row, top_p, top_k)
