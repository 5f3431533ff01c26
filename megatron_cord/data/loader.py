"""Which samples a step trains on, and on which rank: the same on every layout, and known from the step's number alone.

A global batch is a stretch of the row of samples (`Row`), so the position in the data is one integer, and a run resumes
exactly on another layout, also with another batch size: it goes on with the next sample of the row.

The sample at position p of a batch belongs to data-parallel rank p mod DP: its ranks read, decode, augment and
featurise it, generate its responses and train on them; no other rank does, and audio and features never travel between
ranks. What it costs: data-parallel ranks have equally many samples (one more on some if DP does not divide the batch),
not equally many tokens. The prompts of L_seq are the first of the batch, so they are dealt evenly too; choose
``rollout.policy_prompts_per_step`` as a multiple of DP.

Workers read ahead; what they read is decided before, so their number changes nothing but the waiting. A sample that
cannot be read is made known to all ranks before any of them uses the batch; all then put the same other sample in its
place, or stop together.

What it simplifies: workers are threads: reading, decoding and Fourier transforms release the interpreter's lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_cord.data.ordering.damage import Damage, DamagedError
from megatron_cord.data.ordering.row import Address, Row
from megatron_cord.data.samples import PreparedSample, Sample
from megatron_cord.errors import CordError

logger = logging.getLogger(__name__)

#: Makes the JSON values of all ranks known to all of them.
Agree = Callable[[Any], list[Any]]
_SAY_EVERY = 20.0  # seconds
_Reading = tuple[Sequence[Address], Future[list[PreparedSample | Damage]]]


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
        row: the samples.
        batch_size: samples a step, over all data-parallel ranks; may exceed an epoch.
        rank: of this process among the data-parallel ones.
        world: how many they are; they need not divide the batch.
        workers: threads that read the next step's samples ahead.
        first_step: the first step that will be asked for.
        first_sample: how many samples were taken before it, with whatever batch size.
        change: what becomes of a sample at a step, such as its augmentation.
        prepare: makes prompts and features of samples at a step, in the thread that reads them; None makes no prompts.
        agree: makes what a rank has found known to all ranks, collectively; by default this process is alone.
    """

    def __init__(
        self,
        row: Row,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        first_step: int = 0,
        first_sample: int = 0,
        change: Callable[[Sample, int], Sample] | None = None,
        prepare: Callable[[Sequence[Sample], int], list[PreparedSample]] | None = None,
        agree: Agree = lambda value: [value],
    ) -> None:
        if batch_size < 1:
            raise CordError(f"a batch of {batch_size} samples cannot be; choose at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.row = row
        self._batch_size = batch_size
        self._first_step, self._first_sample = first_step, first_sample
        self._rank, self._world = rank, world
        self._change, self._prepare, self._agree = change, prepare or _without_prompts, agree
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._workers = workers
        self._ahead: dict[int, list[_Reading]] = {}

    @property
    def batch_size(self) -> int:
        """Over all ranks."""
        return self._batch_size

    def addresses(self, step: int, first: int | None = None) -> list[Address]:
        """Return the samples of ``step``, counted from 0, by position, as far as damage is known.

        Args:
            step: whose batch.
            first: so many from its beginning; None returns all.
        """
        start = self.position(step)
        count = self._batch_size if first is None else min(first, self._batch_size)
        return [self.row.at(position, self._batch_size) for position in range(start, start + count)]

    def position(self, step: int) -> int:
        """Return how many samples were taken before a step."""
        if step < self._first_step:
            raise ValueError(f"step {step} is before the first, {self._first_step}")
        return self._first_sample + (step - self._first_step) * self._batch_size

    @property
    def positions(self) -> tuple[int, ...]:
        """Where this rank's samples are in every batch."""
        return tuple(range(self._rank, self._batch_size, self._world))

    def batch(self, step: int) -> Batch:
        """Return this rank's samples for ``step``. Collective. With workers, the step after it is then being read.

        Raises:
            DamageLimitError: more samples turn out to be damaged than may be left out.
        """
        reading = self._ahead.pop(step, None) or self._begin(step)
        self._ahead = {step + 1: self._ahead.get(step + 1) or self._begin(step + 1)} if self._pool else {}
        read: dict[Address, PreparedSample | Damage] = {}
        for addresses, future in reading:
            read |= zip(addresses, future.result(), strict=True)
        while True:
            own = self._own(step)
            lacking = [address for address in own if address not in read]
            read |= zip(lacking, self._read(lacking, step), strict=True)
            found = [damage for address in own if isinstance(damage := read[address], Damage)]
            if not self._learn(found, step):
                samples = [sample for address in own if isinstance(sample := read[address], PreparedSample)]
                return Batch(step, self.positions, tuple(samples))

    def texts(self, steps: Iterable[int], first: int) -> dict[Address, Sample]:
        """Return without their audio the samples at the first positions of steps. Every rank reads all; collective.

        Raises:
            DamageLimitError: as `batch` does.
        """
        steps = list(steps)
        read: dict[Address, Sample | Damage] = {}
        while True:
            # In the order of the shards, so that each is opened once.
            wanted = sorted({address for step in steps for address in self.addresses(step, first)})
            lacking = [address for address in wanted if address not in read]
            said = time.monotonic()
            for count, address in enumerate(lacking):
                read[address] = _attempt(self.row.without_audio, address)
                if time.monotonic() - said > _SAY_EVERY:
                    said = time.monotonic()
                    logger.info("read the texts of %d of %d samples", count + 1, len(lacking))
            found = [damage for address in wanted if isinstance(damage := read[address], Damage)]
            if not self._learn(found, steps[0] if steps else 0):
                return {address: sample for address in wanted if isinstance(sample := read[address], Sample)}

    def close(self) -> None:
        """End the workers; what they have read is dropped."""
        self.row.close()  # first, as workers may wait for what it fetches
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _learn(self, found: Sequence[Damage], step: int) -> bool:
        """Make damage known to all ranks; return whether any of them has found some. Collective."""
        everywhere = [Damage.from_json(plain) for share in self._agree([d.to_json() for d in found]) for plain in share]
        self.row.damage.learn(everywhere, step)
        return bool(everywhere)

    def _own(self, step: int) -> list[Address]:
        # Of the whole batch, so that all ranks raise together where a set has no sample left.
        return self.addresses(step)[self._rank :: self._world]

    def _begin(self, step: int) -> list[_Reading]:
        """Give each worker a stretch of this rank's samples; without workers there is nothing to begin."""
        if self._pool is None:
            return []
        self.row.expect(self.position(step + 1))
        own = self._own(step)
        share = max(1, -(-len(own) // self._workers))
        stretches = [own[start : start + share] for start in range(0, len(own), share)]
        return [(stretch, self._pool.submit(self._read, stretch, step)) for stretch in stretches]

    def _read(self, addresses: Sequence[Address], step: int) -> list[PreparedSample | Damage]:
        """Read and prepare samples; those that cannot be read are returned as damage."""
        read = [_attempt(self.row.read, address) for address in addresses]
        samples = [sample for sample in read if isinstance(sample, Sample)]
        if self._change is not None:
            samples = [self._change(sample, step) for sample in samples]
        prepared = iter(self._prepare(samples, step) if samples else ())
        return [item if isinstance(item, Damage) else next(prepared) for item in read]


def _attempt(read: Callable[[Address], Sample], address: Address) -> Sample | Damage:
    try:
        return read(address)
    except DamagedError as error:
        return Damage(address.set, error.first, error.last, str(error), error.fatal)
    except CordError as error:
        return Damage(address.set, address.number, address.number + 1, str(error))


def _without_prompts(samples: Sequence[Sample], step: int) -> list[PreparedSample]:
    return [PreparedSample(sample, {}) for sample in samples]
