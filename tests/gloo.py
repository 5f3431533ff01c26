"""Runs a function on several real gloo ranks, for tests of anything parallel.

Each rank is a fresh process, so the function and its arguments must be picklable: a function at the top of a test module, not a closure.
Starting ranks costs seconds: put many cases into one function rather than many calls into one test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: A collective that some rank never joins fails after this long, instead of hanging the suite.
COLLECTIVE_TIMEOUT = timedelta(seconds=120)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls ``fn(rank, *args)`` on ``world_size`` gloo ranks, one thread each, and returns what each rank returned, in rank order.

    The default process group is initialised through a file store, so no port is taken.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message holds that rank's traceback. The others are stopped.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank_main, args=(world_size, directory, fn, args), nprocs=world_size)
        # Written by our own ranks a moment ago, so unpickling them is safe.
        return [torch.load(Path(directory) / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, directory: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        torch.save(fn(rank, *args), Path(directory) / f"result{rank}.pt")
        dist.barrier()  # the store's file must outlive every rank's use of it
    finally:
        dist.destroy_process_group()
