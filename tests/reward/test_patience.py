"""The limit on code's own time: kept under load, and not used up by others."""

from __future__ import annotations

import threading
import time

from megatron_cord.reward.patience import within


def compute(seconds: float) -> str:
    """Compute for so long, in this thread's own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


def test_time_of_others_does_not_count() -> None:
    """Catches rewards that depend on what else the machine does."""
    stop = threading.Event()

    def hinder() -> None:
        while not stop.is_set():
            pass

    others = [threading.Thread(target=hinder) for _ in range(5)]
    for other in others:
        other.start()
    begun = time.monotonic()
    try:
        assert within(1.0, lambda: compute(0.5), otherwise="given up") == "done"
        assert time.monotonic() - begun > 1.0, "nothing was hindered"
    finally:
        stop.set()
        for other in others:
            other.join()


def test_code_that_does_not_end_is_interrupted() -> None:
    """Catches a computation that goes on after it was given up, and waiting that is never given up."""
    before = threading.active_count()
    assert within(0.2, lambda: compute(60.0), otherwise="given up") == "given up"
    assert threading.active_count() == before
    begun = time.monotonic()
    assert within(0.01, lambda: threading.Event().wait(3.0), otherwise=None) is None
    assert 1.0 <= time.monotonic() - begun < 8.0
