"""Philox against its published vectors and numpy's implementation; Gumbel numbers against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_cord.rollout.local.philox import gumbel, philox

Words = tuple[int, ...]


def reference(counter: Words, key: Words, bits: int, multipliers: Words, steps: Words) -> Words:
    """Philox 4×bits-10 by Python's integers."""
    mask = 2**bits - 1
    a, b, c, d = counter
    for _ in range(10):
        first, second = a * multipliers[0], c * multipliers[1]
        a, b, c, d = (second >> bits) ^ b ^ key[0], second & mask, (first >> bits) ^ d ^ key[1], first & mask
        key = (key[0] + steps[0]) & mask, (key[1] + steps[1]) & mask
    return a, b, c, d


def reference_32(counter: Words, key: Words) -> Words:
    return reference(counter, key, 32, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))


def ours(counter: Words, key: Words) -> Words:
    def words(values: Words) -> list[torch.Tensor]:
        return [torch.tensor([value]) for value in values]

    return tuple(int(word) for word in philox(words(counter), words(key)))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    """The known answers of the authors' library, Random123 (kat_vectors, philox4x32 10)."""
    values = [tuple(int(word, 16) for word in text.split()) for text in (counter, key, expected)]
    assert ours(values[0], values[1]) == values[2] == reference_32(values[0], values[1])


def test_the_reference_is_numpys_with_longer_words() -> None:
    """The generator of numpy has words of 64 bits; with them the reference gives its numbers."""
    multipliers, steps = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
    for start in (0, 2**64 - 2, 12345):
        key = (987654321, 2**63 + 5)
        drawn = np.random.Philox(counter=start, key=key[0] + (key[1] << 64)).random_raw(8).tolist()
        counters = [start + 1, start + 2]  # numpy counts before it draws
        words = [(count % 2**64, count >> 64, 0, 0) for count in counters]
        assert drawn == [word for w in words for word in reference(w, key, 64, multipliers, steps)]


def test_random_words_against_the_reference() -> None:
    """Catches a sign of 64-bit products that enters the words, and axes that broadcast wrongly."""
    rng = np.random.default_rng(0)
    counter, key = rng.integers(0, 2**32, (4, 50, 1)), rng.integers(0, 2**32, (2, 7))
    found = torch.stack(philox(torch.from_numpy(counter).unbind(), torch.from_numpy(key).unbind()))
    assert found.shape == (4, 50, 7)
    for i in range(50):
        for j in range(7):
            words = (tuple(counter[:, i, 0].tolist()), tuple(key[:, j].tolist()))
            assert tuple(found[:, i, j].tolist()) == reference_32(*words)


def test_numbers_are_gumbels() -> None:
    """Catches a wrong transform, bits that two numbers share, a tail that ends early (Kolmogorov–Smirnov)."""
    keys = torch.stack([torch.arange(100), torch.arange(100) + 2**31], dim=-1)
    numbers = gumbel(keys, range(3, 13), 401)
    assert numbers.shape == (10, 100, 401) and numbers.dtype == torch.float64
    assert torch.equal(numbers[4:6, 50:51], gumbel(keys[50:51], range(7, 9), 401))
    uniform = (-(-numbers).exp()).exp().flatten().sort().values
    count = len(uniform)
    assert (uniform - (torch.arange(count) + 0.5) / count).abs().max() < 2 / count**0.5
    assert len(set(uniform.tolist())) == count
    # The largest of n numbers lies around log n, the smallest around -log log n.
    assert abs(numbers.max() - np.log(count)) < 6 and abs(numbers.min() + np.log(np.log(count))) < 0.7
