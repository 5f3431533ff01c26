"""Streams and events that run everything in order, and remember in which order CUDA would.

Each stream counts what is queued on it. Its clock says what of the other streams comes before what it queues next: what
it has waited for. The host's clock says what the host has waited for; what it queues afterwards comes later on every
stream. So memory can be asked whether its last use comes before a new one (Lamport's happened-before, with vector
clocks). Simplification: one clock for all threads of the host.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.pretend_gpu.record import RECORD

Clock = dict[int, int]  #: by stream, how much of what was queued on it
_numbers = itertools.count()
_host: Clock = {}
_local = threading.local()


class Moment(NamedTuple):
    """A place in a stream."""

    stream: int
    tick: int

    @property
    def is_done(self) -> bool:
        """Whether the host has waited for it."""
        return _host.get(self.stream, 0) >= self.tick

    @property
    def is_before_next(self) -> bool:
        """Whether what this thread queues next comes after it."""
        return self.is_done or current_stream().clock.get(self.stream, 0) >= self.tick


def _merge(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Stream:
    """A queue of work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(_numbers)
        self.clock: Clock = {}
        _streams.append(self)

    def queue(self) -> Moment:
        """Queue one more piece of work."""
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return Moment(self.number, self.clock[self.number])

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.wait("stream.synchronize")
        _merge(_host, self.clock)


class Event:
    """A place in a stream, with all that comes before it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.clock, self._seconds = dict((stream or current_stream()).clock), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end._seconds - self._seconds)

    def synchronize(self) -> None:
        RECORD.wait("event.synchronize")
        _merge(_host, self.clock)


_streams: list[Stream] = []
_default = Stream()


def current_stream(*_: Any) -> Stream:
    """Return the stream on which this thread queues."""
    stream: Stream = getattr(_local, "stream", _default)
    return stream


@contextlib.contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    """Queue on a stream."""
    before = current_stream()
    _local.stream = stream or before
    try:
        yield
    finally:
        _local.stream = before


def wait_for_current_stream(kind: str) -> None:
    """Count that the host waits for all that is queued on its stream."""
    RECORD.wait(kind)
    _merge(_host, current_stream().clock)


def synchronize(*_: Any) -> None:
    """Wait for the device."""
    RECORD.wait("torch.cuda.synchronize")
    for stream in _streams:
        _merge(_host, stream.clock)


def install() -> None:
    """Put these into torch.cuda."""
    replacements: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": stream_context,
        "current_stream": current_stream,
        "default_stream": lambda *_: _default,
        "synchronize": synchronize,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    setattr(torch.Tensor, "record_stream", lambda self, *_: None)  # noqa: B010
