"""Recordings of a run's data sets, for the players of its live page."""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.shards.manifest import is_remote
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError


class Recordings:
    """The recordings of a data set, opened at the first use.

    Args:
        data: the directory of its shards, as a run's configuration names it.
    """

    def __init__(self, data: object) -> None:
        self._data = data
        self._lock = threading.Lock()

    @cached_property
    def _found(self) -> tuple[ShardDataset, dict[str, int]]:
        if not isinstance(self._data, str):
            raise CordError("the configuration names no data")
        if is_remote(self._data):
            raise CordError(f"{self._data} is an address; the page plays recordings of local shards")
        dataset = ShardDataset(self._data, max_skipped=1.0)  # what a run left out has no rollouts
        return dataset, {sample_id: index for index, sample_id in enumerate(dataset.ids)}

    def wav(self, sample_id: str) -> bytes | None:
        """Return a sample's recording as WAV; None if there is none. Raises CordError: the shards cannot be read."""
        with self._lock:
            dataset, places = self._found
        place = places.get(sample_id)
        return None if place is None else encode_wav(np.clip(dataset[place].played(), -1.0, 1.0))
