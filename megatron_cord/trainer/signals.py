"""Requests to stop: SIGTERM, and SIGUSR1 as SLURM's notice before the time limit.

A signal only leaves a note. Between two steps the ranks agree whether any of them has one, so that one rank's signal
is enough and all of them stop after the same step.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_cord.runtime.exit_status import STOP_SIGNALS


class StopRequest:
    """Takes note of `cli.STOP_SIGNALS` while it is entered; a context manager of the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective over all ranks."""
        flag = torch.tensor(float(self.received is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
