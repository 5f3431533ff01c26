"""The number of queues to a GPU: one where Megatron-Core counts on the order of kernels, never against the user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import run as torchrun

from megatron_cord import launch
from megatron_cord.runtime import device_queues
from megatron_cord.runtime.device_queues import VARIABLE, missing_setting


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Collect what ranks inherit on a machine with an H100; nothing is started."""
    values: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_queues, "_compute_capability", lambda: 9)
    monkeypatch.setattr(torchrun, "run", lambda _arguments: values.append(os.environ.get(VARIABLE)))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return values


def start(*arguments: str) -> None:
    launch.launch(["--nproc-per-node", "2", "--master-port", "0", "-m", "megatron_cord.train", *arguments])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["parallel.tp=2"], "1"),
        (["parallel.cp=2"], "1"),
        (["parallel.pp=2"], None),
        ([], None),
        (["parallel.tp=two"], None),
        (["parallel=2"], None),
        (["--log-level", "debug", "parallel.tp=2"], "1"),
    ],
)
def test_ranks_inherit_it(arguments: list[str], value: str | None, started: list[str | None]) -> None:
    """Catches layouts that overlap too little, data parallelism that is slowed down, and settings not read."""
    start(*arguments)
    assert started == [value]


def test_the_configuration_is_read(started: list[str | None], tmp_path: Path) -> None:
    """Catches sizes that only overrides can give, a base that is not followed, and an override that does not win."""
    (tmp_path / "base.yaml").write_text("parallel:\n  tp: 4\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\n")
    start("--config", str(tmp_path / "run.yaml"))
    start("--config", str(tmp_path / "missing.yaml"))
    os.environ.pop(VARIABLE)
    start("--config", str(tmp_path / "run.yaml"), "parallel.tp=1")
    assert started[0] == "1" and started[2] is None


def test_the_users_value_stays(started: list[str | None]) -> None:
    """Catches a value of the user's that is overridden."""
    os.environ[VARIABLE] = "8"
    start("parallel.tp=2")
    assert started == ["8"]


def test_blackwell_needs_none(started: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one queue where kernels no longer depend on it, and other streams would wait for nothing."""
    monkeypatch.setattr(device_queues, "_compute_capability", lambda: 10)
    start("parallel.tp=2")
    assert started == [None]


@pytest.mark.parametrize(
    ("value", "sizes", "told"),
    [
        (None, (2, 1, 9), "is not set"),
        ("8", (1, 2, 9), "is 8"),
        ("1", (2, 1, 9), ""),
        (None, (1, 1, 9), ""),
        (None, (2, 1, 10), ""),
    ],
)
def test_other_launchers_are_told(
    value: str | None, sizes: tuple[int, int, int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches torchrun's ranks that run slower in silence, and a warning where nothing is wrong."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    message: Any = missing_setting(*sizes)
    assert told in message and bool(message) == bool(told)
