"""Servers that a run begins with: which ones it refuses, and what brings them to the weights of the run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.engine import SGLangEngine
from tests.rollout.sglang.connection import connect, head_of
from tests.rollout.sglang.fake_sglang import FakeServer, Reply

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"version": "0.5.20"}, "runs SGLang 0.5.20; 0.5.21 or later"),
        ({"version": "nightly"}, "runs SGLang nightly"),
        ({"model_type": "qwen2"}, "serves a qwen2 model"),
    ],
)
def test_servers_that_cannot_be_trained_from(told: Reply, message: str, checkpoint: Path, stack: ExitStack) -> None:
    """Catches an older server, which would take weights without a session.

    Also another model, noticed only by wrong answers.
    """
    server = FakeServer()
    server.info |= told
    with pytest.raises(CordError, match=message):
        connect(checkpoint, [server], stack)


def test_scaled_logprobs_are_refused(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a server whose log-probabilities depend on the temperature: every importance weight would be wrong."""
    server = FakeServer()
    probes = iter([[[-1.0, 0], [-2.0, 1]], [[-1.2, 0], [-1.7, 1]]])
    original = server._generate

    def generate(handler: Any, body: Reply, probe: bool) -> None:
        server.info["probe"] = next(probes)
        original(handler, body, probe)

    server._generate = generate  # type: ignore[method-assign]
    with pytest.raises(CordError, match="scales log-probabilities by the sampling temperature"):
        connect(checkpoint, [server], stack)


def test_a_run_begins_with_the_checkpoints_weights(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a new run that starts from what an earlier one, which was killed, left in its servers."""
    server = FakeServer()
    server.version = "120"
    connect(checkpoint, [server], stack)
    paths = [path for path, _ in server.calls]
    assert ("/update_weights_from_disk", {"model_path": "here", "flush_cache": True}) in server.calls
    assert server.version == "default" and paths.index("/continue_generation") < paths.index(
        "/update_weights_from_disk"
    )


def test_a_run_begins_with_servers_that_an_earlier_one_left_paused(checkpoint: Path, stack: ExitStack) -> None:
    """Catches waiting for a paused server to say that it is healthy before it is told to go on."""
    server = FakeServer()
    server.paused = True
    connect(checkpoint, [server], stack)
    assert not server.paused


def test_all_servers_go_on_after_a_pause(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a cache that is not flushed since responses wait.

    Also a server that fails a weight sync and is paused for ever.
    """
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    source = head_of(checkpoint)
    own.pause()
    assert good.paused and bad.paused
    bad.loads = False
    engine.update_weights(source, 1)
    assert good.version == "1" and bad.version == "default"
    own.resume()
    assert not good.paused and not bad.paused


def test_weights_that_nobody_takes(checkpoint: Path, stack: ExitStack) -> None:
    """Catches endless repetition of a weight sync with servers that answer but cannot load."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack, start_seconds=1.0)
    server.loads = False
    with pytest.raises(
        CordError, match=r"no rollout server takes the weights of version 2: .*update_weights_from_disk failed"
    ):
        engine.update_weights(head_of(checkpoint), 2)


def test_a_wrong_key(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a run that waits for servers which are there, but for others, and a key in the message."""
    with pytest.raises(
        CordError, match=r"refuses the API key; set rollout.sglang.api_key_file or MEGATRON_CORD_SERVER_KEY"
    ) as caught:
        connect(checkpoint, [FakeServer(key="the right one")], stack)
    assert "the right one" not in str(caught.value)


def test_too_few_servers(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a run that waits for ever, and an error that does not say for whom."""
    sglang = SGLangConfig(servers=("http://127.0.0.1:9",), start_seconds=0.5)
    engine = RolloutConfig(engine="sglang", sglang=sglang)
    with pytest.raises(CordError, match=r"0 rollout servers answer, 1 are needed, .*unreachable.*cord serve"):
        build_engine(engine, checkpoint, torch.device("cpu"))
    with pytest.raises(CordError, match=r"rollout.sglang.servers or rollout.sglang.servers_file"):
        RolloutConfig(engine="sglang")
