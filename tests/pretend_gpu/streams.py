"""Streams and events that run everything in order, and remember which copies to and from the host they stand for.

A copy that was queued without waiting is done for the host once the host has waited for its stream, or for an event
that was recorded behind it. On other streams its data may be used behind a wait for either.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from tests.pretend_gpu.memory import Transfer
from tests.pretend_gpu.record import RECORD


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._before: set[Transfer] = set()

    def record(self, stream: Stream | None = None) -> None:
        self._before = set((stream or current_stream()).transfers)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).transfers |= self._before

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 0.0

    def synchronize(self) -> None:
        RECORD.wait("event.synchronize")
        finish(self._before)


class Stream:
    """A queue of work; ``transfers`` are the copies queued on it, or before what it waits for, and not waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.transfers: set[Transfer] = set()
        _streams.append(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.transfers |= other.transfers

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.wait("stream.synchronize")
        finish(self.transfers)


def finish(transfers: set[Transfer]) -> None:
    """Note that the host has waited for these copies."""
    for transfer in transfers:
        transfer.done = True
    transfers.clear()


_streams: list[Stream] = []
_default = Stream()
_local = threading.local()


def current_stream(*_: Any) -> Stream:
    """Return the stream on which this thread queues."""
    return getattr(_local, "stream", _default)


@contextlib.contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    """Queue on a stream."""
    before = current_stream()
    _local.stream = stream or before
    try:
        yield
    finally:
        _local.stream = before


def synchronize(*_: Any) -> None:
    """Wait for the device."""
    RECORD.wait("torch.cuda.synchronize")
    for stream in _streams:
        finish(stream.transfers)


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
