"""Which samples a step trains on: the same whatever the number of ranks, and known from the step's number alone.

Samples come in an endless row of epochs, each a shuffle of its own, drawn from (seed, epoch). A global batch is a stretch of that row; each
data-parallel rank takes its part of the stretch. So the position in the data is one integer, and a run resumes exactly on another layout.

What it simplifies: shuffling needs random access; streaming sets would need a buffer and its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from megatron_cord.data.order import permutation
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError


@dataclass(frozen=True)
class DataConfig:
    """Where the spoken questions are.

    Attributes:
        train: shards to train on: a directory with a manifest, a tar file, or a pattern.
        evaluation: shards to evaluate on, likewise.
        shuffle: a new order each epoch, drawn from the run's seed; otherwise the order of the shards.
        long_audio: what to do with audio longer than the encoder's window: stop with an error, or cut it into several clips.
    """

    train: str
    evaluation: str
    shuffle: bool = True
    long_audio: Literal["error", "cut"] = "error"


class SampleSource(Protocol):
    """Samples by number, ``ShardDataset`` for example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleLoader:
    """Batches of samples by step.

    Args:
        source: at least one sample.
        batch_size: samples a step, over all data-parallel ranks; may exceed an epoch.
        seed: of the shuffle.
        shuffle: False keeps the source's order.
        rank: of this process among the data-parallel ones.
        world: how many they are.

    Raises:
        CordError: when the source is empty, or the ranks do not divide the batch.
    """

    def __init__(self, source: SampleSource, *, batch_size: int, seed: int, shuffle: bool = True, rank: int = 0, world: int = 1) -> None:
        if len(source) == 0:
            raise CordError("the data set holds no samples; make some with tools/synthesize.py")
        if batch_size < 1 or batch_size % world != 0:
            raise CordError(
                f"a batch of {batch_size} samples does not divide among {world} data-parallel ranks; choose a multiple of {world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        self._world = world
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def batch_size(self) -> int:
        """Over all ranks."""
        return self._batch_size

    def epoch(self, step: int) -> float:
        """How many epochs are behind when ``step`` begins."""
        return step * self._batch_size / len(self._source)

    def indices(self, step: int) -> list[int]:
        """The numbers of this rank's samples in the source, for ``step`` counted from 0."""
        share = self._batch_size // self._world
        start = step * self._batch_size + self._rank * share
        places = (divmod(position, len(self._source)) for position in range(start, start + share))
        return [int(self._order(epoch)[offset]) for epoch, offset in places]

    def batch(self, step: int) -> list[Sample]:
        """This rank's samples for ``step``, counted from 0."""
        return [self._source[index] for index in self.indices(step)]

    def _draw_order(self, epoch: int) -> np.ndarray:
        """int64 [samples]."""
        if not self._shuffle:
            return np.arange(len(self._source))
        return permutation(len(self._source), self._seed, epoch)
