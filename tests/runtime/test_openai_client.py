"""The client of OpenAI-compatible endpoints against a real HTTP server, well-behaved and not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import (
    AccessRefusedError,
    EndpointError,
    OpenAIClient,
    Patience,
    RequestRefusedError,
)
from tests.openai_server import OpenAIServer, Reply, Request

KEY = "not-to-be-shown"


def client(server: OpenAIServer, *, timeout: float = 5.0, tries: int = 3, key: bool = False) -> OpenAIClient:
    patience = Patience(timeout, tries, backoff=0.01)
    return OpenAIClient(server.url, api_key_env="TEST_KEY" if key else None, patience=patience, max_reply_bytes=1000)


def first_then(first: Reply, then: Reply) -> Callable[[list[Request]], Reply]:
    return lambda requests: first if len(requests) == 1 else then


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=503),
        Reply(status=429),
        Reply(b"x" * 2000),
        Reply(manner="hang"),
        Reply(b"x" * 900, manner="drip"),
        Reply(b"not a number"),
    ],
    ids=["503", "429", "enormous", "hang", "drip", "unparsable"],
)
def test_what_passes_is_tried_again(first: Reply) -> None:
    """Would catch a try that is not made, and a reply that is never late for a single byte but has no end."""
    with OpenAIServer(first_then(first, Reply(b"12"))) as server:
        connection = client(server, timeout=0.5)
        assert connection.post("audio/speech", parse=int, json={"input": "hi"}) == 12
        assert [request.path for request in server.requests] == ["audio/speech"] * 2
        connection.close()


@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        (400, RequestRefusedError, 1),
        (422, RequestRefusedError, 1),
        (401, AccessRefusedError, 1),
        (404, AccessRefusedError, 1),
        (402, EndpointError, 1),
        (307, EndpointError, 1),
        (500, EndpointError, 3),
    ],
)
def test_statuses(status: int, error: type[EndpointError], requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch tries of what cannot pass, a refused text taken for an endpoint that is away, and a key in a message.

    Some endpoints quote the key that they refuse.
    """
    monkeypatch.setenv("TEST_KEY", KEY)
    with OpenAIServer(lambda _: Reply(f"wrong key {KEY}".encode(), status)) as server:
        with pytest.raises(error, match=rf"audio/speech .*\(status {status}: wrong key \[key\]\)") as raised:
            client(server, key=True).post("audio/speech", parse=bytes, json={})
        assert type(raised.value) is error and KEY not in str(raised.value)
        assert [request.key for request in server.requests] == [f"Bearer {KEY}"] * requests


def test_an_endpoint_that_is_away() -> None:
    """Would catch a traceback, or a try without end, where nothing listens."""
    with OpenAIServer(lambda _: Reply()) as gone:
        pass
    with pytest.raises(EndpointError, match=r"does not serve \(ConnectError"):
        client(gone, tries=2).post("x", parse=bytes, json={})


def test_threads_share_a_client() -> None:
    """Would catch replies that go to another thread, requests one after the other, and a thread that stays behind."""
    before = threading.active_count()
    with OpenAIServer(lambda requests: Reply(requests[-1].body, manner="slow")) as server:
        connection = client(server)
        with ThreadPoolExecutor(4) as pool:
            numbers = list(pool.map(lambda i: connection.post("x", parse=int, content=str(i).encode()), range(8)))
        assert numbers == list(range(8)) and server.most == 4
        connection.close()
        assert connection.post("x", parse=int, content=b"8") == 8, "a closed client begins anew"
        connection.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_key_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an endpoint without a key that gets an empty one."""
    monkeypatch.setenv("TEST_KEY", "")
    with OpenAIServer(lambda _: Reply(b"1")) as server:
        client(server, key=True).post("x", parse=bytes, json={})
        assert server.requests[0].key is None


def test_a_key_that_no_header_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a line break at the end of a key, which makes the HTTP client quote the key in its error."""
    monkeypatch.setenv("TEST_KEY", f"{KEY}\n")
    with OpenAIServer(lambda _: Reply(b"1")) as server:
        client(server, key=True).post("x", parse=bytes, json={})
        assert server.requests[0].key == f"Bearer {KEY}"
    for wrong in (f"{KEY}\n{KEY}", f"{KEY}é"):
        monkeypatch.setenv("TEST_KEY", wrong)
        with pytest.raises(CordError, match="TEST_KEY holds characters that no key has") as raised:
            OpenAIClient("http://localhost:1/v1", api_key_env="TEST_KEY")
        assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:1", "the endpoint's address must look like http"),
        ("ftp://host/v1", "must look like http"),
        ("http://host:port/v1", "must look like http"),
        ("http:///v1", "must look like http"),
        ("http://a:b@host/v1", "holds a name or a password"),
    ],
)
def test_addresses_that_cannot_be(url: str, message: str) -> None:
    """Would catch an address that only fails later, and a password on its way into logs."""
    with pytest.raises(CordError, match=message) as raised:
        OpenAIClient(url)
    assert "a:b" not in str(raised.value)


def test_pauses_grow_up_to_a_bound() -> None:
    """Would catch pauses of minutes, all clients that come back at the same moment, and settings without a meaning."""
    patience = Patience(tries=9, backoff=1.0)
    pauses = [patience.pause(attempt) for attempt in range(1, 9)]
    assert all(2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses[:4])) and max(pauses) <= 30
    assert len({patience.pause(1) for _ in range(20)}) > 1
    for wrong in ({"timeout": 0.0}, {"tries": 0}, {"backoff": -1.0}):
        with pytest.raises(CordError, match="timeout must be positive"):
            Patience(**wrong)
