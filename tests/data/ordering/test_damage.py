"""Damage that turns up during a run: counted once, within the bound, and taken up by a resumed run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_cord.data.ordering.damage import Damage, DamageLog, Ranges
from megatron_cord.errors import CordError


def test_ranges_hold_what_was_added() -> None:
    """Would catch numbers that get lost, or are counted twice, where ranges overlap, touch or lie in each other."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        ranges, held = Ranges(), set[int]()
        for _ in range(int(rng.integers(1, 8))):
            first = int(rng.integers(0, 40))
            last = first + int(rng.integers(1, 12))
            ranges.add(first, last)
            held |= set(range(first, last))
        assert [number for number in range(60) if number in ranges] == sorted(held) and len(ranges) == len(held)
        pairs = ranges.pairs()
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(pairs))
        assert Ranges(pairs).pairs() == pairs


def test_the_bound_is_a_share_of_each_set() -> None:
    """Would catch damage that is counted twice as two ranks find it, or against the samples of another set."""
    log = DamageLog({"a": 100, "b": 10}, {"a": 2, "b": 0}, 0.1)
    log.learn([Damage("a", 5, 6, "x"), Damage("a", 5, 6, "x"), Damage("a", 10, 17, "y")], 3)
    assert log.count("a") == 8 and [(step, d.message) for step, d in log.found] == [(3, "x"), (3, "y")]
    log.learn([Damage("b", 0, 1, "z")], 4)
    assert log.covers("b", 0) and not log.covers("a", 0) and log.state() == {"a": [(5, 6), (10, 17)], "b": [(0, 1)]}
    again = DamageLog({"a": 100, "b": 10}, {"a": 2, "b": 0}, 0.1, log.state())
    assert again.count("a") == 8 and not again.found
    message = r"11 of 100 samples of set a cannot be used, more than data\.max_skipped=0\.1 allows; the last: w"
    with pytest.raises(CordError, match=message):
        again.learn([Damage("a", 20, 21, "w")], 5)


def test_damage_of_a_set_that_is_left_out_for_a_while() -> None:
    """Would catch damage that is forgotten with its set, so that a set that comes back has other samples."""
    first = DamageLog({"a": 100, "b": 10}, {"a": 0, "b": 0}, 0.5, {"b": [(0, 2)]})
    without = DamageLog({"a": 100}, {"a": 0}, 0.5, first.state())
    without.learn([Damage("a", 5, 6, "x")], 3)
    again = DamageLog({"a": 100, "b": 10}, {"a": 0, "b": 0}, 0.5, without.state())
    assert again.covers("b", 1) and again.covers("a", 5) and again.count("b") == 2


def test_nothing_may_be_skipped_by_default() -> None:
    """Would catch a sample that is left out though nobody allowed it."""
    with pytest.raises(CordError, match=r"^the shard is gone$"):
        DamageLog({"": 1000}, {"": 0}, 0.0).learn([Damage("", 0, 1, "the shard is gone")], 0)
    with pytest.raises(CordError, match=r"^too long$"):
        DamageLog({"": 1000}, {"": 0}, 0.5).learn([Damage("", 0, 1, "too long", fatal=True)], 0)
