"""Sets in turn: exact shares at every position, found without the positions before."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_cord.data.ordering.mixture import Mixture


def weight_lists() -> list[list[float]]:
    rng = np.random.default_rng(0)
    drawn = [[float(w) for w in rng.integers(1, 60, size=rng.integers(2, 12))] for _ in range(12)]
    return [[2, 1, 1], [0.7, 0.2, 0.1], [0.5, 0.33, 0.17, 0.001], [99, 1], [1], [1e-3, 1e3], *drawn]


@pytest.mark.parametrize("weights", weight_lists(), ids=str)
def test_counts_are_less_than_one_from_the_shares(weights: list[float]) -> None:
    """Would catch a rule whose rounding adds up, in a long run or with many sets, and a wrong place within a set."""
    mixture = Mixture({f"s{number}": weight for number, weight in enumerate(weights)})
    exact = {f"s{number}": Fraction(repr(weight)) for number, weight in enumerate(weights)}
    total, taken = sum(exact.values()), Counter[str]()
    for position in range(3000):
        name, before = mixture.at(position)
        assert before == taken[name]
        taken[name] += 1
        worst = max(abs(taken[each] - (position + 1) * share / total) for each, share in exact.items())
        assert worst < 1, (position, worst)
    assert mixture.counts(3000) == {name: taken[name] for name in exact}


def test_any_position_is_found_alone() -> None:
    """Would catch a turn or a count that depends on what was asked before, as a resumed run asks late ones first."""
    weights = {"a": 0.61, "b": 0.2345, "c": 0.1555}
    whole = Mixture(weights)
    row = [whole.at(position) for position in range(30000)]
    for position in (29999, 0, 10001, 4096, 8191, 25000):
        assert Mixture(weights).at(position) == row[position]
    assert Mixture(weights).counts(20001) == Counter({"a": 0, "b": 0, "c": 0} | Counter(n for n, _ in row[:20001]))


def test_only_the_ratio_of_weights_counts() -> None:
    """Would catch floats that are added up, and an order of the sets in the file that changes the row."""
    one, other = Mixture({"a": 0.3, "b": 0.1}), Mixture({"b": 1, "a": 3})
    assert [one.at(p) for p in range(100)] == [other.at(p) for p in range(100)]
    assert one.shares == other.shares == {"a": Fraction(3, 4), "b": Fraction(1, 4)}
