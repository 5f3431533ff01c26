"""The order of weights and generation on the device, with stand-ins of CUDA's streams: what events make certain.

On a GPU each thread queues on a stream of its own, and a stream waits for another only where an event says so. The
stand-ins keep, for each stream, which accesses to the weights its next one is certain to come after.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.samples import Sample
from megatron_cord.parallel import portability
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.rollout.weights import PlainWeights

HEAD = "language_model.lm_head.weight"


class Stream:
    """One thread's; an event is the set of accesses that precede it."""

    def __init__(self) -> None:
        self.before: set[int] = set()

    def record_event(self) -> frozenset[int]:
        return frozenset(self.before)

    def wait_event(self, event: frozenset[int]) -> None:
        self.before |= event


class Device:
    """All streams, and the accesses to the weights in the host's order."""

    def __init__(self) -> None:
        self._threads, self._lock = threading.local(), threading.Lock()
        self.accesses: list[str] = []
        self.races: list[str] = []

    def current_stream(self, *_: object) -> Stream:
        if not hasattr(self._threads, "stream"):
            self._threads.stream = Stream()
        stream: Stream = self._threads.stream
        return stream

    def access(self, kind: str) -> None:
        """Queue a read or a write on this thread's stream; a race if it need not come after one it conflicts with."""
        with self._lock:
            stream, number = self.current_stream(), len(self.accesses)
            for other, done in enumerate(self.accesses):
                if "write" in (kind, done) and other not in stream.before:
                    self.races.append(f"{kind} {number} may overtake {done} {other}")
            self.accesses.append(kind)
            stream.before.add(number)


class Update(PlainWeights):
    """A source of one tensor, whose copy is a write."""

    def __init__(self, device: Device, tensor: Tensor) -> None:
        super().__init__({HEAD: tensor})
        self._device = device

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        self._device.access("write")
        return super().tensors(full=full, in_pieces=in_pieces, merged=merged)


def test_weights_and_tokens_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy of weights that overtakes the token before a pause, and a token that overtakes the copy."""
    create_checkpoint(tmp_path, TinyModelConfig(), ["one", "two", "plus", "what", "is"], seed=0)
    engine = LocalEngine(tmp_path)
    model = engine._loaded()
    head = model.parameter(HEAD)
    assert head is not None
    device, started = Device(), threading.Event()
    monkeypatch.setattr(portability, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", device.current_stream)
    forward = model.hidden

    def hidden(*arguments: Any, **settings: Any) -> Any:
        device.access("read")
        started.set()
        return forward(*arguments, **settings)

    monkeypatch.setattr(model, "hidden", hidden)
    prompt = engine.prompts.text_prompt(Sample(id="sample", question="what is one plus two"))
    requests = [GenerationRequest(prompt, 1.0, 64, seed=i) for i in range(8)]
    thread = threading.Thread(target=engine.generate, args=(requests,))
    thread.start()
    assert started.wait(20)
    for version in (1, 2, 3):
        engine.pause()
        engine.update_weights(Update(device, head.detach().clone()), version)
        engine.resume()
    thread.join(20)
    engine.generate(requests[:1])  # by another thread, after all of it
    assert not thread.is_alive() and not device.races, device.races[:3]
    order = device.accesses
    assert order[0] == order[-1] == "read" and order.count("write") == 3
    assert "read" in order[order.index("write") : -1]
