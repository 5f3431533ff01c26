"""Which samples a step trains on, and on which rank: the same on every layout, and known from the step's number alone.

Samples come in an endless row of epochs, each a shuffle of its own, drawn from (seed, epoch). A global batch is a
stretch of that row, so the position in the data is one integer, and a run resumes exactly on another layout, also
with another batch size: it goes on with the next sample of the row.

The sample at position p of a batch belongs to data-parallel rank p mod DP: its ranks read, decode, augment and
featurise it, generate its responses and train on them; no other rank does, and audio and features never travel between
ranks. What it costs: data-parallel ranks have equally many samples (one more on some if DP does not divide the batch),
not equally many tokens. The prompts of L_seq are the first of the batch, so they are dealt evenly too; choose
``rollout.policy_prompts_per_step`` as a multiple of DP.

Workers read ahead; what they read is decided before, so their number changes nothing but the waiting.

What it simplifies: shuffling needs random access; streaming sets would need a buffer and its state. Workers are
threads: reading, decoding and Fourier transforms release the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import numpy as np

from megatron_cord.data.audio.augmentation import AugmentationConfig
from megatron_cord.data.order import permutation
from megatron_cord.data.samples import PreparedSample, PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError


@dataclass(frozen=True)
class DataConfig:
    """Where the spoken questions are, and what is made of them."""

    train: str = ""  #: shards to train on: a directory with a manifest, a tar file, or a pattern; training needs it
    evaluation: str = ""  #: shards to evaluate on, likewise
    system: str | None = None  #: the system prompt of samples that bring none
    #: text behind the recording, in the user's turn, of samples that bring neither an instruction nor turns
    instruction: str | None = None
    shuffle: bool = True  #: a new order each epoch, drawn from the run's seed; otherwise the order of the shards

    #: Audio longer than the encoder's window: stop before the first step, cut it into several clips, or skip the
    #: sample, within max_skipped.
    long_audio: Literal["error", "cut", "skip"] = "error"
    #: the largest share of a set's samples that may be left out because they are damaged; 0 stops at the first
    max_skipped: float = 0.0
    verify: bool = False  #: compare the shards' checksums with their manifest at the start, which reads all of them
    #: threads of each rank that read and featurise its share of the next step's samples; 0 does it when they are needed
    workers: int = 1
    #: what computes them: torch, or NVIDIA DALI on the CPU or on each rank's GPU
    features: Literal["torch", "dali", "dali_gpu"] = "torch"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)  #: of the audio that is trained on

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_skipped < 1.0:
            raise CordError(f"data.max_skipped is a share from 0 to below 1, not {self.max_skipped}")
        if self.long_audio == "skip" and not self.max_skipped:
            raise CordError(
                "data.long_audio=skip leaves samples out; say how many it may be with data.max_skipped, such as 0.01"
            )
        if self.workers < 0:
            raise CordError(f"data.workers cannot be negative, got {self.workers}")

    def open(self, which: Literal["train", "evaluation"], limits: PromptLimits) -> ShardDataset:
        """Open a data set under these rules.

        Args:
            which: of the two.
            limits: what the model's prompts can be made of.

        Raises:
            CordError: it is not named, a recording is too long and may neither be cut nor skipped, or what
                `ShardDataset` raises.
        """
        path = getattr(self, which)
        if not path:
            raise CordError(
                f"data.{which} is required: set it in the configuration or as data.{which}=…, to a directory of shards"
            )
        shards = ShardDataset(
            path,
            max_skipped=self.max_skipped,
            limits=limits if self.long_audio == "skip" else replace(limits, longest=None),
            defaults=PromptDefaults(self.system, self.instruction),
            verify=self.verify,
        )
        if self.long_audio == "error" and limits.longest is not None:
            shards.refuse_longer(limits.longest)
        return shards


class SampleSource(Protocol):
    """Samples by number, ``ShardDataset`` for example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """One data-parallel rank's share of a step's samples.

    Attributes:
        step: counted from 0.
        positions: of the samples in the step's batch over all data-parallel ranks, ascending.
        samples: one for each position.
    """

    step: int
    positions: tuple[int, ...]
    samples: tuple[PreparedSample, ...]

    def at(self, position: int) -> PreparedSample:
        """Return the sample at a position of the step's batch.

        Raises:
            KeyError: it belongs to another data-parallel rank.
        """
        return self._by_position[position]

    @cached_property
    def _by_position(self) -> dict[int, PreparedSample]:
        return dict(zip(self.positions, self.samples, strict=True))


class SampleLoader:
    """Batches of samples by step.

    Args:
        source: at least one sample.
        batch_size: samples a step, over all data-parallel ranks; may exceed an epoch.
        seed: of the shuffle.
        shuffle: False keeps the source's order.
        rank: of this process among the data-parallel ones.
        world: how many they are; they need not divide the batch.
        workers: threads that read the next step's samples ahead.
        first_step: the first step that will be asked for.
        first_sample: how many samples were taken before it, with whatever batch size.
        change: what becomes of a sample at a step, such as its augmentation.
        prepare: makes prompts and features of samples, in the thread that reads them; None makes no prompts.

    Raises:
        CordError: the source is empty.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        first_step: int = 0,
        first_sample: int = 0,
        change: Callable[[Sample, int], Sample] | None = None,
        prepare: Callable[[Sequence[Sample]], list[PreparedSample]] | None = None,
    ) -> None:
        if len(source) == 0:
            raise CordError("the data set holds no samples")
        if batch_size < 1:
            raise CordError(f"a batch of {batch_size} samples cannot be; choose at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._first_step, self._first_sample = first_step, first_sample
        self._shuffle = shuffle
        self._rank, self._world = rank, world
        self._order = lru_cache(maxsize=2)(self._draw_order)
        self._change, self._prepare = change, prepare or _without_prompts
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._workers = workers
        self._ahead: dict[int, list[Future[list[PreparedSample]]]] = {}

    @property
    def batch_size(self) -> int:
        """Over all ranks."""
        return self._batch_size

    def epoch(self, step: int) -> float:
        """Return how many epochs are behind when ``step`` begins."""
        return self._position(step) / len(self._source)

    def indices(self, step: int) -> list[int]:
        """Return the numbers in the source of all samples of ``step``, counted from 0, by position."""
        start = self._position(step)
        places = (divmod(number, len(self._source)) for number in range(start, start + self._batch_size))
        return [int(self._order(epoch)[offset]) for epoch, offset in places]

    def _position(self, step: int) -> int:
        """Return how many samples were taken before a step."""
        if step < self._first_step:
            raise ValueError(f"step {step} is before the first, {self._first_step}")
        return self._first_sample + (step - self._first_step) * self._batch_size

    @property
    def positions(self) -> tuple[int, ...]:
        """Where this rank's samples are in every batch."""
        return tuple(range(self._rank, self._batch_size, self._world))

    def batch(self, step: int) -> Batch:
        """Return this rank's samples for ``step``. With workers, those of the step after it are then being read."""
        if self._pool is None:
            return Batch(step, self.positions, tuple(self._read(self._own(step), step)))
        reading = self._ahead.pop(step, None) or self._begin(self._pool, step)
        self._ahead = {step + 1: self._ahead.get(step + 1) or self._begin(self._pool, step + 1)}
        return Batch(step, self.positions, tuple(sample for part in reading for sample in part.result()))

    def close(self) -> None:
        """End the workers; what they have read is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _own(self, step: int) -> list[int]:
        return self.indices(step)[self._rank :: self._world]

    def _begin(self, pool: ThreadPoolExecutor, step: int) -> list[Future[list[PreparedSample]]]:
        """Give each worker a stretch of this rank's samples."""
        indices = self._own(step)
        share = max(1, -(-len(indices) // self._workers))
        return [
            pool.submit(self._read, indices[start : start + share], step) for start in range(0, len(indices), share)
        ]

    def _read(self, indices: Sequence[int], step: int) -> list[PreparedSample]:
        samples = [self._source[index] for index in indices]
        if self._change is not None:
            samples = [self._change(sample, step) for sample in samples]
        return self._prepare(samples)

    def _draw_order(self, epoch: int) -> np.ndarray:
        """int64 [samples]."""
        if not self._shuffle:
            return np.arange(len(self._source))
        return permutation(len(self._source), self._seed, epoch)


def _without_prompts(samples: Sequence[Sample]) -> list[PreparedSample]:
    return [PreparedSample(sample, {}) for sample in samples]
