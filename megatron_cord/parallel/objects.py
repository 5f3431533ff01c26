"""Small plain values between ranks, as JSON: nothing that is received can execute code."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.parallel.transfers import to_device

_TICK = 1.0  #: seconds between two collectives of ranks that wait for the first


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in rank order, on every rank. Collective over the group (None: all ranks).

    The values pass through JSON, on one rank too: tuples become lists, keys become strings.

    Raises:
        TypeError: a value that JSON cannot represent.
    """
    text = json.dumps(value)
    world = dist.get_world_size(group)
    if world == 1:
        return [json.loads(text)]
    device = portability.device()
    payload = to_device(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), device)
    sizes = torch.empty(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, sizes.new_full((1,), len(payload)), group=group)
    counts = sizes.tolist()  # the host waits here and below, not for each rank
    padded = torch.nn.functional.pad(payload, (0, max(counts) - len(payload)))
    gathered = torch.empty(world * max(counts), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    rows = gathered.cpu().view(world, -1).numpy()
    return [json.loads(bytes(row[:count])) for row, count in zip(rows, counts, strict=True)]


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return the value of the global rank `source` on every rank; other ranks' values are ignored. Collective."""
    return all_gather_json(value if dist.get_rank() == source else None)[source]


def run_on_main(work: Callable[[], Any]) -> Any:
    """Return what `work` returns on rank 0, on every rank. Collective.

    It may take longer than a collective may (`parallel.timeout_minutes`): it runs in a thread, while the ranks tell
    each other once a second that they are there. So it has a limit of its own, starts no process that shall end with
    its thread, and calls no collective.

    Raises:
        CordError: `work` raised it, on every rank.
        RuntimeError: `work` raised something else; on rank 0 that itself.
        TypeError: a value that JSON cannot represent.
    """
    future: Future[Any] | None = None
    if dist.get_rank() == 0:
        future = Future()
        threading.Thread(target=_fulfil, args=(future, work), name="run_on_main", daemon=True).start()
    while True:
        report = None
        if future is not None and wait([future], _TICK).done:
            error = future.exception()
            report = [None if error is None else str(error), isinstance(error, CordError), _value_of(future)]
        if (told := broadcast_json(report)) is not None:
            break
    problem, refused, value = told
    if problem is None:
        return value
    if refused:
        raise CordError(problem)
    if future is not None:
        future.result()
    raise RuntimeError(f"rank 0 failed: {problem}")


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _value_of(future: Future[Any]) -> Any:
    return future.result() if future.exception() is None else None
