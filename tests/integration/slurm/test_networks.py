"""Real torchrun on two hosts: two network namespaces, joined by virtual cards, an agent and a rank in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_run import ROOT, finish, losses, overrides, start, write_inputs

pytestmark = pytest.mark.slurm
HOSTS = {"cordtest0": "10.231.77.1", "cordtest1": "10.231.77.2"}


def ip(*arguments: str) -> None:
    """Call iproute2."""
    subprocess.run(["ip", *arguments], check=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Make two namespaces that see each other and nothing else."""
    assert os.geteuid() == 0 and shutil.which("ip"), (
        "network namespaces need root and iproute2; run as root, apt-get install iproute2"
    )
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "cord0", "netns", "cordtest0", "type", "veth", "peer", "name", "cord1", "netns", "cordtest1")
        for number, (name, address) in enumerate(HOSTS.items()):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cord{number}")
            ip("-n", name, "link", "set", f"cord{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30)


def test_two_hosts_train_like_one(hosts: None, tmp_path: Path) -> None:
    """Catches ranks that only meet over loopback, and a run over two hosts that differs from one host's."""
    inputs, output = write_inputs(tmp_path / "inputs"), tmp_path / "two"
    settings = overrides(inputs, output, "parallel.tp=2", "checkpoint.interval=0")
    processes = []
    for number, name in enumerate(HOSTS):
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": f"cord{number}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1",
            "--master-addr", HOSTS["cordtest0"], "--master-port", "29511",
            "-m", "megatron_cord.train", "--config", os.devnull, *settings,
        ]  # fmt: skip
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [status for _, status in ends] == [0, 0], ends
    status, errors = finish(start(overrides(inputs, tmp_path / "one", "parallel.tp=2", "checkpoint.interval=0")))
    assert status == 0, errors
    assert losses(output) == losses(tmp_path / "one") and len(losses(output)) == 5
