"""Runs a function on several real gloo ranks, for tests of anything parallel.

Each rank is a process of its own, so the function and its arguments must be picklable: a function at the top of a
test module, not a closure. Ranks are forked from one server that has imported torch, transformers and the project
once and computed nothing, so that they start at once and share no state. The first call of a session starts the
server, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

#: A collective that some rank never joins fails after this long, instead of hanging the suite.
COLLECTIVE_TIMEOUT = timedelta(seconds=120)
#: What the server imports.
PRELOADED = ["tests.preloaded"]


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` gloo ranks, one thread each; return the results in rank order.

    The default process group is initialised through a file store, so no port is taken.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message holds that rank's traceback. The
        others are stopped.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        settings = (world_size, directory, dict(os.environ), fn, args)
        launch: Any = start_processes
        launch(_rank_main, args=settings, nprocs=world_size, start_method="forkserver")
        # Written by this test's own ranks a moment ago, so unpickling them is safe.
        return [torch.load(Path(directory) / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    directory: str,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # a test may have changed it since the server started
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    dist.barrier()  # a function may leave this group at once, while another rank still connects
    try:
        torch.save(fn(rank, *args), Path(directory) / f"result{rank}.pt")
        dist.barrier()  # the store's file must outlive every rank's use of it
    finally:
        dist.destroy_process_group()
