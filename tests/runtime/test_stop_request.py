"""Requests to stop: the first Ctrl-C is noted, a second one ends the process wherever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cord.runtime import stop_request
from megatron_cord.runtime.stop_request import StopRequest

SCRIPT = """
import ctypes, os, signal
from megatron_cord.runtime.log import configure_logging
from megatron_cord.runtime.stop_request import StopRequest
configure_logging("info")
with StopRequest("the shard is written") as request:
    os.kill(os.getpid(), signal.SIGINT)
    assert request.received is signal.SIGINT
    print("noted", flush=True)
    libc = ctypes.PyDLL(None)
    while True:
        libc.usleep(100000)  # with the interpreter's lock, so that no handler of Python's runs
        print("alive", flush=True)
"""


def test_the_second_ends_the_process() -> None:
    """Catches a first one that interrupts, a second one that waits for Python, and a status that says success."""
    environment = os.environ | {"PYTHONPATH": str(Path(stop_request.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors == "Ctrl-C: the shard is written first; a second Ctrl-C leaves at once\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_handlers_are_given_back(number: signal.Signals) -> None:
    """Catches a signal after the work that nobody reads, and a request that is forgotten."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest("it is done") as request:
        assert not request
        os.kill(os.getpid(), number)
    assert request and request.received is number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
