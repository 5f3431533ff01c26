"""Faults of running jobs, on real ranks: each run is disturbed, continued, and must end like one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_cord import cli
from tests.tiny_run import finish, losses, overrides, start, write_inputs

STEPS = 8
TP2 = "parallel.tp=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs: Path, output: Path, *more: str) -> list[str]:
    return overrides(inputs, output, TP2, f"train.steps={STEPS}", "evaluation.samples=1", "evaluation.scored=1", *more)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must end like."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    status, errors = finish(start(settings(inputs, output)))
    assert status == 0, errors
    return output


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Waits until something has happened; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
        time.sleep(0.01)


def steps_made(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks' processes under a launcher."""
    return [child for child in psutil.Process(process.pid).children() if "megatron_cord.train" in child.cmdline()]


@pytest.mark.parametrize(("number", "whom"), [(signal.SIGTERM, "launcher"), (signal.SIGUSR1, "one rank")])
def test_a_request_to_stop(inputs: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals, whom: str) -> None:
    """Catches a signal that kills, that one rank alone follows, a stop without a checkpoint, a restart of what shall end, and another status."""
    output = tmp_path / "run"
    process = start(settings(inputs, output, "checkpoint.interval=0"), launcher=["--max-restarts", "2"])
    wait_for(process, lambda: steps_made(output) >= 2)
    os.kill(process.pid if whom == "launcher" else ranks(process)[1].pid, number)
    status, errors = finish(process)
    assert status == cli.STOPPED, errors
    (saved,) = os.listdir(output / "checkpoints")
    step = int(saved.removeprefix("step_"))
    assert step == steps_made(output) < STEPS and f"asked to stop after step {step}; the same command continues after step {step}" in errors
    assert "Traceback" not in errors and "FAILED" not in errors
    status, errors = finish(start(settings(inputs, output)))
    assert status == 0 and f"resuming after step {step}" in errors
    assert losses(output) == losses(undisturbed)
