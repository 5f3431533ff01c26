"""Phases of a step: their seconds on the device, and their names in a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function


class Phases:
    """Times phases between events in the device's queue of work, so that no phase has to wait for its kernels."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._last: Any = None  # the event behind all others

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside as a part of this phase; each phase may come several times."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        with record_function(f"cord.{name}"):
            yield
        end.record()
        self._spans[name].append((begin, end))
        self._last = end

    def seconds(self) -> dict[str, float]:
        """Return `seconds_PHASE` of all phases so far, at least one. It waits until the device has ended them."""
        self._last.synchronize()
        return {
            f"seconds_{name}": sum(begin.elapsed_time(end) for begin, end in spans) / 1000
            for name, spans in self._spans.items()
        }
