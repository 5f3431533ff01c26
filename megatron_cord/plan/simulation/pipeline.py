"""When each stage of a pipeline works on which microbatch: Megatron's schedules, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.parallel.stages import forward_order, pass_order

_Pass = tuple[bool, int, int, int]  #: backward, chunk, rank, microbatch


@dataclass(frozen=True)
class Pipeline:
    """A schedule that ran.

    Attributes:
        seconds: until the last rank is done.
        finished: seconds at which each rank is done.
        idle: seconds that the busiest rank waited.
    """

    seconds: float
    finished: tuple[float, ...]
    idle: float


def run_pipeline(
    forward: Sequence[float],
    backward: Sequence[float] | None,
    microbatches: int,
    send: float = 0.0,
    chunks: int = 1,
) -> Pipeline:
    """Return the times of a pipeline.

    A rank works in its own order (`parallel.stages`). A pass begins when its input is there and the rank is free. The
    chunks of a rank take equally long.

    Args:
        forward: seconds of each rank's forward passes of a microbatch, all of its chunks together.
        backward: likewise; None: there are forward passes alone.
        microbatches: how many; interleaved stages fill them up to the number of ranks.
        send: seconds from a stage to the next.
        chunks: interleaved stages of a rank.
    """
    ranks = len(forward)
    if chunks > 1 and microbatches:
        microbatches = max(microbatches, ranks)
    if backward is None:
        same = [(False, *each) for each in forward_order(microbatches, ranks, chunks)] if microbatches else []
        orders = [same] * ranks
    else:
        orders = [pass_order(microbatches, ranks, chunks, rank) if microbatches else [] for rank in range(ranks)]
    done: dict[_Pass, float] = {}  # when it ended
    free, position = [0.0] * ranks, [0] * ranks
    while any(place < len(order) for place, order in zip(position, orders, strict=True)):
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                is_backward, chunk, number = order[position[rank]]
                source = _source(is_backward, chunk, rank, number, ranks, chunks)
                if source is not None and source not in done:
                    break
                ready = 0.0 if source is None else done[source] + (send if source[1:3] != (chunk, rank) else 0.0)
                takes = (backward[rank] if is_backward and backward is not None else forward[rank]) / chunks
                free[rank] = max(free[rank], ready) + takes
                done[is_backward, chunk, rank, number] = free[rank]
                position[rank] += 1
    busy = max(
        microbatches * (ahead + (0.0 if backward is None else backward[rank])) for rank, ahead in enumerate(forward)
    )
    return Pipeline(max(free), tuple(free), max(free) - busy)


def _source(is_backward: bool, chunk: int, rank: int, number: int, ranks: int, chunks: int) -> _Pass | None:
    """Return the pass whose result this one needs; None for the first stage's forward pass."""
    stage = chunk * ranks + rank
    if is_backward:
        if stage == chunks * ranks - 1:
            return False, chunk, rank, number
        return True, (stage + 1) // ranks, (stage + 1) % ranks, number
    return None if stage == 0 else (False, (stage - 1) // ranks, (stage - 1) % ranks, number)
