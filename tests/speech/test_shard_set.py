"""Shards made in parallel: a worker that dies is one line, and jobs are taken as they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_cord.errors import CordError
from megatron_cord.speech.receipts import Receipt
from megatron_cord.speech.shard_set import make_all


def make(job: int) -> Receipt:
    if job < 0:
        os._exit(9)  # as the kernel ends it when memory is short
    return Receipt(None, {}, float(job), [])


def test_a_worker_that_dies_is_one_line() -> None:
    """Would catch a traceback of the pool in the place of what to do."""
    with pytest.raises(CordError, match=r"a worker process ended unexpectedly.*what is complete is kept"):
        list(make_all([-1, 2, 3], make, 2))


def test_jobs_are_taken_as_they_are_needed() -> None:
    """Would catch all rows of a set in memory, waiting for workers."""
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(20):
            taken.append(job)
            yield job

    ended = 0
    for job, receipt in make_all(jobs(), make, 2):
        ended += 1
        assert receipt.seconds == job and len(taken) <= ended + 4
    assert ended == 20
