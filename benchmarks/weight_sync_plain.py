"""What `benchmarks.weight_sync` compares with.

The same bytes taken from one process to another by the plainest means of each transport.

    process_group   one gloo broadcast of one tensor
    shared_memory   one process copies into shared memory, the other copies out of it
    disk            one process writes a file, the other reads it

Bytes have arrived when the receiver's answer is back. Nothing of the project is used here.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def plain_seconds(transport: str, nbytes: int, rounds: int) -> list[float]:
    """Seconds of each round, in two processes of their own; one more round before them does not count."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_rank, args=(rank, transport, nbytes, rounds, directory, results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        seconds: list[float] = results.get(timeout=300)
        for process in processes:
            process.join()
    return seconds


def _rank(rank: int, transport: str, nbytes: int, rounds: int, directory: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mine = torch.ones(nbytes, dtype=torch.uint8) if rank == 0 else torch.zeros(nbytes, dtype=torch.uint8)
    shared = None
    if transport == "shared_memory":
        if rank == 0:
            shared = SharedMemory("cord-benchmark", create=True, size=nbytes)
        dist.barrier()
        shared = shared or SharedMemory("cord-benchmark")
    window = None if shared is None else torch.frombuffer(shared.buf, dtype=torch.uint8)[:nbytes]
    file, word, seconds = Path(directory) / "bytes", torch.zeros(1), []
    for _ in range(rounds + 1):
        dist.barrier()
        begun = time.perf_counter()
        if rank == 0:
            if transport == "process_group":
                dist.broadcast(mine, 0)
            elif transport == "disk":
                mine.numpy().tofile(file)
            elif window is not None:
                window.copy_(mine)
            if transport != "process_group":
                dist.send(word, 1)  # the bytes are there
            dist.recv(word, 1)  # and the receiver has them
            seconds.append(time.perf_counter() - begun)
            continue
        if transport == "process_group":
            dist.broadcast(mine, 0)
        else:
            dist.recv(word, 0)
            if window is None:
                np.fromfile(file, dtype=np.uint8)
            else:
                mine.copy_(window)
        dist.send(word, 0)
    if rank == 0:
        results.put(seconds[1:])
    dist.barrier()
    dist.destroy_process_group()
    del window
    if shared is not None:
        shared.close()
        if rank == 0:
            shared.unlink()
