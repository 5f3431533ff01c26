"""The order within a set: every sample once an epoch, at any place, in windows of shards where shards are streamed."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cord.data.ordering.order import EpochOrder, WindowOrder, permutation

COUNTS = [5, 3, 0, 7, 4, 6, 1, 5]
TOTAL = sum(COUNTS)
SHARD = np.repeat(np.arange(len(COUNTS)), COUNTS)


def test_the_order_of_one_set_is_that_of_earlier_revisions() -> None:
    """Would catch another order of the samples for runs that were begun, or measured, before."""
    order = EpochOrder(10, (1,))
    assert [order.at(place) for place in range(20)] == [*permutation(10, 1, 0), *permutation(10, 1, 1)]
    assert [int(i) for i in permutation(10, 1, 0)] == [int(i) for i in permutation(10, *(1, 0))]
    plain = EpochOrder(3, (1,), shuffle=False)
    assert [plain.at(place) for place in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 20])
def test_windows_of_shards(window: int) -> None:
    """Would catch samples that are left out or come twice, shards read outside their window, an order like the last."""
    order = WindowOrder(COUNTS, window, (1,))
    epochs = [[order.at(place) for place in range(start, start + TOTAL)] for start in (0, TOTAL, 2 * TOTAL)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for epoch in epochs:
        seen = list(dict.fromkeys(int(shard) for shard in SHARD[epoch]))
        last = {shard: max(place for place, sample in enumerate(epoch) if SHARD[sample] == shard) for shard in seen}
        for place, sample in enumerate(epoch):  # so many shards are needed at a time
            begun = {int(SHARD[other]) for other in epoch[: place + 1]}
            assert len([shard for shard in begun if last[shard] >= place]) <= window, (place, sample)
    if window > 1:
        assert any(epoch != sorted(epoch, key=lambda i: (seen.index(int(SHARD[i])), i)) for epoch in epochs)
    assert [WindowOrder(COUNTS, window, (1,)).at(place) for place in (70, 3)] == [
        epochs[2][70 - 2 * TOTAL],
        epochs[0][3],
    ]


def test_shards_are_announced_before_they_are_needed() -> None:
    """Would catch a prefetch that comes too late, of the wrong shards, or stops at the end of an epoch."""
    order = WindowOrder(COUNTS, 2, (3,))
    for place in range(3 * TOTAL):
        near = order.shards_near(place)
        assert int(SHARD[order.at(place)]) in near[:2] and len(near) <= 4
        following = next(p for p in range(place, place + 2 * TOTAL) if int(SHARD[order.at(p)]) not in near[:2])
        assert int(SHARD[order.at(following)]) in near


def test_without_shuffling_the_order_is_the_manifest_s() -> None:
    """Would catch windows that shuffle all the same."""
    order = WindowOrder(COUNTS, 3, (1,), shuffle=False)
    assert [order.at(place) for place in range(TOTAL + 2)] == [*range(TOTAL), 0, 1]
