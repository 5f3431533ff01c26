"""An entry point for the tests of errors: ``python failing_ranks.py HOW``, alone or under a launcher."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cord.cli import run
from megatron_cord.errors import CordError


def main() -> int | None:
    """Meets the other ranks, then ends as the first argument says."""
    how = sys.argv[1]
    if how == "status":
        return 7
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    if how == "all":
        raise CordError(f"shard {dist.get_rank()} is\n  truncated")
    if how == "full":
        Path("/dev/full").write_text("x")
    if first and how == "one":
        raise CordError("shard 0 is truncated")
    if first and how == "bug":
        raise KeyError("bug")
    if first and how == "interrupt":
        raise KeyboardInterrupt
    if first and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    if first:
        print("threads", os.environ["OMP_NUM_THREADS"])
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    run(main)
