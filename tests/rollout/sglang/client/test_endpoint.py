"""A server over HTTP that answers anything, or nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each


class Handler(BaseHTTPRequestHandler):
    """Answers by the path."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(length)
        if self.path == "/hangs":
            time.sleep(1.5)
        status, content = {
            "/fine": (200, asked),
            "/garbage": (200, b"<html>\xff"),
            "/list": (200, b"[1]"),
            "/refuses": (400, b'{"success": false, "message": "no such\\n group"}'),
            "/unsuccessful": (200, b'{"success": false, "message": "half loaded"}'),
            "/server_info": (200, b'{"tp_size": 2, "dp_size": 4}'),
            "/weights_checker": (200, b'{"ranks": [{"sums": {}}]}'),
            "/key": (200, json.dumps({"key": self.headers.get("Authorization")}).encode()),
        }.get(self.path, (500, b"x" * 5000))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}", api_key="a secret")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("/garbage", "answered no JSON map: <html>", 200),
        ("/list", "answered no JSON map", 200),
        ("/refuses", "answered 400: .*no such", 400),
        ("/unsuccessful", "failed: half loaded", 200),
        ("/other", "answered 500: x{300}…$", 500),
        ("/hangs", "did not answer within 0.5 s", None),
    ],
)
def test_every_failure_is_one_line(endpoint: Endpoint, path: str, words: str, status: int | None) -> None:
    """Catches an answer that is taken for success, a traceback, and a page of HTML in the log."""
    with pytest.raises(ServerError, match=words) as caught:
        endpoint.post(path, {}, 0.5)
    assert caught.value.status == status and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_dead_server() -> None:
    """Catches a connection error that escapes under its own name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dead = Endpoint(f"http://127.0.0.1:{port}")
    with pytest.raises(ServerError, match="is unreachable: ConnectError") as caught:
        dead.get("/model_info", 1)
    assert caught.value.status is None and not dead.is_healthy(1)


def test_answers_of_another_form(endpoint: Endpoint) -> None:
    """Catches replicas that would get no weights, and checksums that are none."""
    with pytest.raises(ServerError, match="runs with dp_size=4"):
        endpoint.abilities(1)
    with pytest.raises(ServerError, match="in another form"):
        endpoint.checksums(1)


def test_the_key_is_sent_and_not_shown(endpoint: Endpoint) -> None:
    """Catches a key in a message or a dump, and a request without it."""
    assert endpoint.post("/key", {}, 1) == {"key": "Bearer a secret"}
    with pytest.raises(ServerError) as caught:
        endpoint.post("/other", {}, 1)
    assert "secret" not in str(caught.value) + repr(endpoint) + str([endpoint])


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "https://127.0.0.1:1", "http://127.0.0.1", "http://:30000"])
def test_addresses(url: str) -> None:
    """Catches an address that would fail only at the first weight sync."""
    with pytest.raises(CordError, match="http://host:port"):
        Endpoint(url)


def test_a_password_in_an_address() -> None:
    """Catches a password that stands in config.yaml and in every message about the server."""
    with pytest.raises(CordError, match="holds a name or a password") as caught:
        Endpoint("http://me:secret@127.0.0.1:30000")
    assert "secret" not in str(caught.value)


def test_another_machine_needs_a_key() -> None:
    """Catches weights that anyone on the network could replace."""
    with pytest.raises(CordError, match="has no API key"):
        Endpoint("http://10.0.0.7:30000")
    Endpoint("http://10.0.0.7:30000", api_key="a secret")


@pytest.mark.parametrize("key", ["a secret\n", "größe"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    """Catches a key that the HTTP client quotes in its error."""
    with pytest.raises(CordError, match="no header can hold") as caught:
        Endpoint("http://127.0.0.1:30000", api_key=key)
    assert key.strip() not in str(caught.value)


def test_all_are_called_at_once(endpoint: Endpoint) -> None:
    """Catches one server's failure that hides another's answer."""
    other = Endpoint(endpoint.url.replace("127.0.0.1", "localhost"))
    answers, failures = call_each(
        [endpoint, other], lambda s: s.post("/fine" if s is endpoint else "/refuses", {"a": 1}, 1)
    )
    assert answers == {endpoint: {"a": 1}} and list(failures) == [other]
