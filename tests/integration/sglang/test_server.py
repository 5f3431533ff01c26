"""The real SGLang server as a child process, on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.client.protocol import OLDEST_SGLANG
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig, SglangServer, check_version
from tests.tiny_run import ROOT, write_checkpoint

PYTHON = ROOT / ENVIRONMENT / "bin" / "python"
KEY = "a-key-that-must-stay-hidden"
needs_server = pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """Start a server of a tiny checkpoint, with a key."""
    directory = tmp_path_factory.mktemp("served")
    config = ServerConfig(checkpoint=write_checkpoint(directory / "checkpoint"), device="cpu", python=PYTHON)
    started = SglangServer(config, KEY, directory / "log" / "server.log")
    started.start()
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def _generate(endpoint: Endpoint, temperature: float) -> list[float]:
    body = {
        "input_ids": [2, 7, 9],
        "sampling_params": {"temperature": temperature, "max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [7, 8, 9],
    }
    found = endpoint.post("/generate", body, 60.0)["meta_info"]["output_token_ids_logprobs"][0]
    return [float(entry[0]) for entry in found]


@needs_server
@pytest.mark.slow
def test_logprobs_do_not_depend_on_the_temperature(server: SglangServer) -> None:
    """Would catch a server that scales log-probs by the sampling temperature, as SGLang does by default."""
    assert _generate(server.endpoint, 2.0) == pytest.approx(_generate(server.endpoint, 1.0), abs=1e-5)


@needs_server
@pytest.mark.slow
def test_the_key_is_wanted_and_hidden(server: SglangServer) -> None:
    """Would catch a server that anyone on the machine can use, and a key in its log or in a process's arguments."""
    with pytest.raises(ServerError, match="401"):
        Endpoint(server.url).post("/generate", {"input_ids": [2], "sampling_params": {"max_new_tokens": 1}}, 60.0)
    log = server.log.read_text()
    assert "server_args" in log and KEY not in log
    arguments = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
    assert KEY not in arguments


@needs_server
@pytest.mark.slow
def test_ends_with_its_starter(tmp_path: Path) -> None:
    """Would catch servers that stay and hold memory and port when their starter is killed."""
    script = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from megatron_cord.rollout.sglang.server.process import *\n"
        "checkpoint, python, log = map(Path, sys.argv[1:])\n"
        "s = SglangServer(ServerConfig(checkpoint=checkpoint, device='cpu', python=python), '', log)\n"
        "s.start(); print(s.pid, flush=True); time.sleep(3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    starter = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(PYTHON), str(tmp_path / "log")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    group, deadline = int(starter.stdout), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("the server outlived its starter")


@needs_server
def test_version_is_found() -> None:
    """Would catch an environment with a server too old to take weights."""
    assert check_version(PYTHON) >= OLDEST_SGLANG


def test_an_environment_without_a_server_is_refused() -> None:
    """Would catch a stack trace, or a wait for a server that cannot start."""
    with pytest.raises(CordError, match="make sglang-env"):
        check_version(Path("/nowhere/python"))
    with pytest.raises(CordError, match="make sglang-env"):
        check_version(Path(sys.executable))


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    """Would catch a server whose weights anyone on the network can change."""
    config = ServerConfig(checkpoint=tmp_path, host="0.0.0.0", port=30000)
    with pytest.raises(CordError, match="no API key"):
        SglangServer(config, "", tmp_path / "log")
