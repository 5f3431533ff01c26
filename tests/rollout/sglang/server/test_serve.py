"""The command that supervises servers, on processes that only speak SGLang's protocol; its files of addresses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.addresses import (
    Addresses,
    make_key,
    read_key,
    read_servers_file,
    write_servers_file,
)
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.server.supervisor import SupervisorConfig, share_gpus
from tests.tiny_run import ROOT, write_checkpoint

KEY = "a-key-that-must-stay-hidden"


def wait(until: Callable[[], object], what: str, patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """Write a stand-in for .venv-sglang/bin/python, which prints its version and serves without a model."""
    script = tmp_path / "python"
    fake = ROOT / "tests" / "rollout" / "sglang" / "fake_sglang.py"
    script.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && { echo 0.5.21; exit; }\n'
        f'[ -e "{tmp_path}/broken" ] && exit 1\nshift\nexec {sys.executable} {fake} "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def command(interpreter: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command with two servers; ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        arguments = [
            sys.executable,
            str(ROOT / "tools/serve_rollout.py"),
            str(write_checkpoint(tmp_path / "checkpoint")),
            "--servers-file",
            str(tmp_path / "servers.json"),
            "--count",
            "2",
            "--device",
            "cpu",
            "--python",
            str(interpreter),
            "--log-dir",
            str(tmp_path / "logs"),
            *more,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEGATRON_CORD_SERVER_KEY": KEY}
        with (tmp_path / "said").open("w") as said:
            started.append(subprocess.Popen(arguments, stderr=said, stdout=said, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children()]


def test_servers_are_kept_running(command: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Catches a dead server that stays dead, another address after that, servers that outlive the command.

    Also a file of addresses that does, and a key that others can read.
    """
    process = command()
    file = tmp_path / "servers.json"
    wait(file.exists, "the file of addresses")
    urls = read_servers_file(file)

    def healthy() -> bool:
        return all(Endpoint(url).is_healthy(5.0) for url in urls)

    wait(healthy, "both servers")
    first, second = children(process)
    os.kill(first, signal.SIGKILL)
    wait(
        lambda: len(children(process)) == 2 and first not in children(process) and second in children(process),
        "a new server",
    )
    wait(healthy, "the new server")
    said = (tmp_path / "said").read_text()
    assert urls[0] in said and "ended" in said and KEY not in said
    assert all(KEY not in " ".join(psutil.Process(pid).cmdline()) for pid in children(process))
    left = children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not file.exists() and not any(psutil.pid_exists(pid) for pid in left)


def test_a_server_that_cannot_start(command: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Catches a command that starts a hopeless server again for ever, and other servers that are left behind."""
    (tmp_path / "broken").touch()
    process = command()
    assert process.wait(120) == 2
    said = (tmp_path / "said").read_text()
    assert "error: server 0 failed to start 3 times in a row" in said and not (tmp_path / "servers.json").exists()


def test_addresses(tmp_path: Path) -> None:
    """Catches servers of one node that hide another's, a file taken for one while it is not.

    Also addresses without their key.
    """
    addresses = Addresses(servers_file=tmp_path / "nodes", api_key_file=tmp_path / "key")
    assert make_key(tmp_path / "key") == make_key(tmp_path / "key") == read_key(tmp_path / "key")
    assert addresses.find() == []
    for node in "ab":
        write_servers_file(
            tmp_path / "nodes" / f"{node}.json", Path("checkpoint"), "0.5.21", [f"http://{node}:1", "http://c:1"]
        )
    assert addresses.find() == [Endpoint(f"http://{host}:1", make_key(tmp_path / "key")) for host in "acb"]
    (tmp_path / "nodes" / "b.json").write_text('{"servers": 3}')
    with pytest.raises(CordError, match=r"b.json: 'servers' must be a list"):
        addresses.find()
    (tmp_path / "nodes" / "b.json").write_text("[]")
    with pytest.raises(CordError, match=r"b.json is no file of servers"):
        addresses.find()


def test_the_key_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key that others can read, an empty one, and one that is not where it should be."""
    file = tmp_path / "key"
    make_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(CordError, match="can be read by others"):
        read_key(file)
    file.write_text("")
    with pytest.raises(CordError, match="holds no API key"):
        read_key(file)
    with pytest.raises(CordError, match="cannot read the API key"):
        read_key(tmp_path / "none")
    monkeypatch.setenv("MEGATRON_CORD_SERVER_KEY", KEY)
    assert read_key(None) == KEY and KEY not in json.dumps(str(Addresses(("http://127.0.0.1:1",)).find()))


def test_gpus_are_shared() -> None:
    """Catches two servers on one GPU."""
    assert share_gpus((), 2, 2) == [(0, 1), (2, 3)]
    assert share_gpus((4, 5, 6), 3, 1) == [(4,), (5,), (6,)]
    with pytest.raises(CordError, match="need 4, 3 are named"):
        share_gpus((1, 2, 3), 2, 2)
    with pytest.raises(CordError, match="at least 1"):
        SupervisorConfig(count=0)
