"""Ids that occurred, beside a set of Python's."""

from __future__ import annotations

import numpy as np

from megatron_cord.speech.recordings.seen_ids import SeenIds


def test_the_same_as_a_set() -> None:
    """Would catch an id that is forgotten when arrays are merged, and a new one that is taken for an old."""
    draw = np.random.default_rng(0)
    seen, reference = SeenIds(), set[str]()
    for number in draw.integers(0, 30_000, size=50_000):
        name = f"utterance-{number}"
        assert seen.add(name) == (name not in reference)
        reference.add(name)
    assert len(reference) > 20_000
