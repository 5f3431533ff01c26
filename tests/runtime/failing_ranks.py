"""An entry point for the tests of errors: ``python failing_ranks.py HOW``, alone or under a launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from megatron_cord.errors import CordError
from megatron_cord.runtime.entry import run
from megatron_cord.runtime.exit_status import PEER_GONE, STOPPED


class Slow:
    """A terminal that takes a second for whatever is printed."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        time.sleep(1.0)
        return self._terminal.write(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()


def main() -> int | None:
    """End as the first argument says: at once, or after meeting the other ranks."""
    how = sys.argv[1]
    if how == "status":
        return 7
    if how in ("stopped", "again"):
        with Path(sys.argv[2]).open("a") as file:
            file.write("start\n")
        return STOPPED if how == "stopped" else PEER_GONE
    rank = int(os.environ["RANK"])
    if how == "slow":
        sys.stderr = Slow(sys.stderr)
    if how in ("all", "slow"):
        raise CordError(f"shard {rank} is\n  truncated")
    if how == "full":
        Path("/dev/full").write_text("x")
    import torch  # takes seconds, which the others need not wait for
    import torch.distributed as dist

    dist.init_process_group("gloo")
    first = rank == 0
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
