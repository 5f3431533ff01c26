"""A small HTTP server that stands for an OpenAI-compatible endpoint, well-behaved or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Literal, Self

from tests.rollout.sglang.fake_sglang import BusyHTTPServer


@dataclass(frozen=True)
class Request:
    """One POST.

    Attributes:
        path: below the address, "chat/completions".
        key: the Authorization header.
        body: as it came.
    """

    path: str
    key: str | None
    body: bytes


@dataclass(frozen=True)
class Reply:
    """The answer to a request; `manner` is how it is sent: "hang" sends nothing, "drip" one byte in 0.1 s."""

    body: bytes = b""
    status: int = 200
    manner: Literal["whole", "slow", "hang", "drip"] = "whole"


def wait_for_threads(count: int) -> None:
    """Wait until no more threads than so many are there, at most 10 s, and fail if there are."""
    deadline = time.monotonic() + 10
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= count, threading.enumerate()


class OpenAIServer:
    """A context manager.

    Args:
        reply: what it answers, given the requests so far, the newest one last.

    Attributes:
        requests: all of them.
        most: requests that were in flight at the same time, at most.
        url: its address with the version.
    """

    def __init__(self, reply: Callable[[list[Request]], Reply]) -> None:
        self.requests: list[Request] = []
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        self._leave = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with owner._lock:
                    request = Request(self.path.removeprefix("/v1/"), self.headers["Authorization"], body)
                    owner.requests.append(request)
                    requests = list(owner.requests)
                    owner._now += 1
                    owner.most = max(owner.most, owner._now)
                try:
                    owner._send(self, reply(requests))
                finally:
                    with owner._lock:
                        owner._now -= 1

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        self._server = BusyHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.manner == "hang":
            self._leave.wait(30)
            handler.close_connection = True
            return
        if reply.manner == "slow":
            time.sleep(0.2)
        handler.send_response(reply.status)
        handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        if reply.manner != "drip":
            handler.wfile.write(reply.body)
            return
        for byte in reply.body:
            if self._leave.wait(0.1):
                return
            try:
                handler.wfile.write(bytes([byte]))
            except OSError:
                handler.close_connection = True
                return

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        self._server.shutdown()
        self._server.server_close()
