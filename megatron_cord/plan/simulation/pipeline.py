"""When each stage of a pipeline works on which microbatch: Megatron's 1F1B schedule, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pipeline:
    """A schedule that ran.

    Attributes:
        seconds: until the last stage is done.
        finished: seconds at which each stage is done.
        idle: seconds that the busiest stage waited.
    """

    seconds: float
    finished: tuple[float, ...]
    idle: float


def run_pipeline(
    forward: Sequence[float], backward: Sequence[float] | None, microbatches: int, send: float = 0.0
) -> Pipeline:
    """Return the times of a pipeline.

    A stage works in its own order: as many forward passes as there are stages behind it, then one forward and one
    backward pass in turns, then the backward passes that are left. A pass begins when its input is there and the stage
    is free.

    Args:
        forward: seconds of each stage's forward pass of a microbatch.
        backward: likewise; None: there are forward passes alone.
        microbatches: how many.
        send: seconds from a stage to its neighbour.
    """
    stages = len(forward)
    orders = [_order(stage, stages, microbatches, backward is not None) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}  # by (backward, stage, microbatch): when it ended
    free, position = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(position, orders, strict=True)):
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                is_backward, number = order[position[stage]]
                source = _source(is_backward, stage, stages, number)
                if source is not None and source not in done:
                    break
                ready = 0.0 if source is None else done[source] + (send if source[1] != stage else 0.0)
                takes = backward[stage] if is_backward and backward is not None else forward[stage]
                free[stage] = max(free[stage], ready) + takes
                done[is_backward, stage, number] = free[stage]
                position[stage] += 1
    busy = max(
        microbatches * (ahead + (0.0 if backward is None else backward[stage])) for stage, ahead in enumerate(forward)
    )
    return Pipeline(max(free), tuple(free), max(free) - busy)


def _order(stage: int, stages: int, microbatches: int, trains: bool) -> list[tuple[bool, int]]:
    """Return the passes of a stage in its order, as (backward, microbatch)."""
    if not trains:
        return [(False, number) for number in range(microbatches)]
    ahead = min(stages - stage - 1, microbatches)
    order = [(False, number) for number in range(ahead)]
    for number in range(microbatches - ahead):
        order += [(False, ahead + number), (True, number)]
    return order + [(True, number) for number in range(microbatches - ahead, microbatches)]


def _source(is_backward: bool, stage: int, stages: int, number: int) -> tuple[bool, int, int] | None:
    """Return the pass whose result this one needs; None for the first stage's forward pass."""
    if is_backward:
        return (False, stage, number) if stage == stages - 1 else (True, stage + 1, number)
    return None if stage == 0 else (False, stage - 1, number)
