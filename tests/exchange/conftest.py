"""Real SGLang servers for tests, in the environment that SGLANG_PYTHON names, .venv-sglang by default."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.rollout.exchange.trial import StartedServer

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang/bin/python"))
COMMAND = f"{shlex.quote(str(PYTHON))} {shlex.quote(str(ROOT / 'tests/exchange/cpu_sglang.py'))} --model-path {{checkpoint}} --port {{port}} --dtype {{dtype}}"
START_SECONDS = 600.0  # a busy machine takes minutes


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exchange") / "checkpoint"
    create_checkpoint(directory, TinyModelConfig(), ["one", "two", "plus"], seed=0)
    return directory


@pytest.fixture(scope="session")
def command() -> str:
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} is missing; the real server needs an environment with SGLang (SGLANG_PYTHON)")
    return COMMAND


@pytest.fixture
def servers(checkpoint: Path, command: str, tmp_path: Path) -> Iterator[list[StartedServer]]:
    """Two, of the checkpoint, in float32."""
    pair = [StartedServer(command, checkpoint, "float32", tmp_path / f"server{i}.log") for i in range(2)]
    with pair[0], pair[1]:
        for server in pair:
            server.wait(START_SECONDS)
        yield pair
