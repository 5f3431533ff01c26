"""The engine on servers that only speak SGLang's protocol: what it does when they fail.

The real server is in tests/integration/sglang.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.engine import SGLangEngine
from tests.rollout.sglang.connection import check, connect, head_of, requests
from tests.rollout.sglang.fake_sglang import FakeServer, Reply

pytestmark = pytest.mark.usefixtures("one_rank")


def test_requests_are_spread_and_bounded(checkpoint: Path, stack: ExitStack) -> None:
    """Catches rollouts out of order, one server that gets all, and more requests at once than allowed."""
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        server.seconds = 0.02
    check(connect(checkpoint, servers, stack, max_in_flight=6), 40)
    counts = [len(server.asked) for server in servers]
    assert sum(counts) == 40 and min(counts) >= 10, counts
    assert all(server.most <= 6 for server in servers)
    assert {len({body["rid"] for body in server.asked}) for server in servers} == set(counts)
    sampling = servers[0].asked[0]["sampling_params"]
    assert sampling["temperature"] == 1.0 and 3 in sampling["stop_token_ids"] and 5 in sampling["stop_token_ids"]


@pytest.mark.parametrize("manner", ["500", "garbage", "break", "older", "foreign ids", "cut off"])
def test_a_server_that_fails_is_left_out(
    manner: str, checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a rollout lost, doubled or believed that a failing server made, and a failure in silence."""
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack)
    engine.update_weights(head_of(checkpoint), 4)
    assert good.version == bad.version == "4"
    if manner == "older":
        bad.version = "default"  # it was started again, with the checkpoint's weights
    manners: dict[str, str | Callable[[Reply], Reply]] = {
        "older": "good",
        "foreign ids": lambda body: bad.good(body, [7, 24, 3]),
        "cut off": lambda body: bad.good(body, [7], "length"),
    }
    bad.manner = manners.get(manner, manner)
    check(engine, version=4)
    assert 1 <= len(bad.asked) < 20
    lines = [line for line in caplog.messages if bad.url in line]
    assert lines and lines[0].startswith(f"rollout: {bad.url} gets no requests"), lines
    bad.manner = "good"
    engine.update_weights(head_of(checkpoint), 5)
    before = len(bad.asked)
    check(engine, version=5)
    assert len(bad.asked) > before, "a weight sync must bring a server back"


def test_a_hanging_server(checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that waits for a server that accepts requests and never answers.

    Also requests that are not withdrawn from it.
    """
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack, reissue_seconds=2.0, request_seconds=300.0)
    bad.manner = "hang"
    check(engine)
    withdrawn = {body["rid"] for path, body in bad.calls if path == "/abort_request"}
    assert withdrawn and withdrawn <= {body["rid"] for body in bad.asked}
    assert "it is requested from another server, too" in caplog.text


def test_the_time_for_a_request_is_bounded(checkpoint: Path, stack: ExitStack) -> None:
    """Catches a request without an end where re-issuing is off."""
    good, bad = FakeServer(), FakeServer()
    engine = connect(checkpoint, [good, bad], stack, request_seconds=3.0)
    bad.manner = "hang"
    check(engine)


def test_a_request_that_always_fails_stops_the_run(checkpoint: Path, stack: ExitStack) -> None:
    """Catches endless repetition, an error without the sample's name, and a refusal that is tried again."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack, tries=2)
    server.manner = "500"
    with pytest.raises(CordError, match=r"sample s0: 2 tries .* answered 500"):
        engine.generate(requests(1))
    server.manner = "good"
    engine.update_weights(head_of(checkpoint), 1)
    server.key = "another"
    with pytest.raises(CordError, match=r"refuses a request \(401\)"):
        engine.generate(requests(1))


def test_when_all_are_lost_they_are_waited_for(
    checkpoint: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends with its last server, rollouts of the restarted server's old weights.

    Also what was made before that is lost.
    """
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    engine.update_weights(head_of(checkpoint), 3)
    check(engine, 5, version=3)
    port = int(server.url.rsplit(":", 1)[1])
    server.__exit__(None, None, None)
    own = engine.engine
    assert isinstance(own, SGLangEngine)
    assert [r.finish_reason for r in own.generate(requests(3))] == ["abort"] * 3
    again: list[FakeServer] = []  # with the checkpoint's weights
    starter = threading.Timer(1.5, lambda: again.append(stack.enter_context(FakeServer(port=port))))
    starter.start()
    check(engine, version=3)
    starter.join()
    assert again[0].version == "3" and "/update_weights_from_disk" in [path for path, _ in again[0].calls]
    assert "waiting for 1 server" in caplog.text


def test_abort_returns_what_is_whole(checkpoint: Path, stack: ExitStack) -> None:
    """Catches an abort that waits for the servers, loses whole responses, or leaves requests with the servers."""
    server = FakeServer()
    engine = connect(checkpoint, [server], stack)
    reply = server.good
    server.manner = lambda body: reply(body) if body["input_ids"][1] % 2 else (server.leave.wait(30), reply(body))[1]
    own = engine.engine
    assert isinstance(own, SGLangEngine)

    def abort_soon() -> None:
        while len(server.asked) < 10:
            time.sleep(0.02)
        time.sleep(0.5)
        own.abort()

    thread = threading.Thread(target=abort_soon)
    thread.start()
    rollouts = own.generate(requests(10))
    thread.join()
    assert [r.finish_reason for r in rollouts] == ["stop", "abort"] * 5
    assert len([path for path, _ in server.calls if path == "/abort_request"]) == 5
