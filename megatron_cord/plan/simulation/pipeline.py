"""When each stage of a pipeline works on which microbatch, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.parallel.stages import forward_order, joint_order, pass_order

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


def run_joint_pipeline(
    forward: Sequence[float], backward: Sequence[float], loss: float, microbatches: int, send: float = 0.0
) -> Pipeline:
    """Return the times of a pipeline whose ranks all form the loss of a microbatch at the same time.

    Args:
        forward: seconds of each rank's forward pass of a microbatch.
        backward: likewise.
        loss: seconds of a microbatch's loss, on every rank.
        microbatches: how many.
        send: seconds from a stage to the next.
    """
    ranks = len(forward)
    orders = [joint_order(microbatches, ranks, rank) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}  # when a pass of a rank ended
    free, position = [0.0] * ranks, [0] * ranks
    for number in range(microbatches + 1):  # until the loss of this number, and after the last one
        for _ in range(ranks):  # a pass on one rank may wait for one of each other
            for rank, order in enumerate(orders):
                while position[rank] < len(order):
                    kind, own = order[position[rank]]
                    source = ("forward", rank - 1, own) if kind == "forward" else ("backward", rank + 1, own)
                    if kind == "loss" or (0 <= source[1] < ranks and source not in done):
                        break
                    ready = done[source] + send if 0 <= source[1] < ranks else 0.0
                    free[rank] = max(free[rank], ready) + (forward if kind == "forward" else backward)[rank]
                    done[kind, rank, own] = free[rank]
                    position[rank] += 1
        if number < microbatches:
            assert all(order[place] == ("loss", number) for order, place in zip(orders, position, strict=True))
            free = [max(free) + loss] * ranks
            position = [place + 1 for place in position]
    busy = max(microbatches * (ahead + back + loss) for ahead, back in zip(forward, backward, strict=True))
    return Pipeline(max(free), tuple(free), max(free) - busy)


def _source(is_backward: bool, chunk: int, rank: int, number: int, ranks: int, chunks: int) -> _Pass | None:
    """Return the pass whose result this one needs; None for the first stage's forward pass."""
    stage = chunk * ranks + rank
    if is_backward:
        if stage == chunks * ranks - 1:
            return False, chunk, rank, number
        return True, (stage + 1) // ranks, (stage + 1) % ranks, number
    return None if stage == 0 else (False, (stage - 1) // ranks, (stage - 1) % ranks, number)
