"""Which ids have occurred, in 8 bytes each.

An id is known by 64 bits of its digest. What it simplifies: two different ids of a million have the same bits, and the
second is then left out as a repetition, with a probability of 3e-8.
"""

from __future__ import annotations

import hashlib

import numpy as np

_NEWEST = 1 << 12  # ids that wait to be sorted


class SeenIds:
    """A growing set of ids: sorted arrays, each at least twice as long as the next, and a small set of the newest."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # uint64 [ids]
        self._newest: set[int] = set()

    def add(self, name: str) -> bool:
        """Add an id; return whether it is new."""
        digest = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        if digest in self._newest or any(_holds(array, digest) for array in self._sorted):
            return False
        self._newest.add(digest)
        if len(self._newest) == _NEWEST:
            array = np.fromiter(self._newest, np.uint64, _NEWEST)
            self._newest.clear()
            while self._sorted and len(self._sorted[-1]) < 2 * len(array):
                array = np.concatenate([array, self._sorted.pop()])
            array.sort()
            self._sorted.append(array)
        return True


def _holds(array: np.ndarray, digest: int) -> bool:
    place = int(np.searchsorted(array, np.uint64(digest)))
    return place < len(array) and int(array[place]) == digest
