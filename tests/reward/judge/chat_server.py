"""A small HTTP server that speaks the chat protocol, rightly or wrongly as the response that is judged asks for."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self

from tests.rollout.sglang.fake_sglang import BusyHTTPServer


class ChatServer:
    """A context manager. The last line of the judged response is what to do: ``yes``, ``no``, ``500``, ``once 500``, ``hang``, ….

    Attributes:
        requests: (Authorization header, payload) of each request.
        most: requests that were in flight at the same time, at most.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str | None, dict[str, Any]]] = []
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        self.leave = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.requests.append((self.headers["Authorization"], payload))
                    owner._now += 1
                    owner.most = max(owner.most, owner._now)
                try:
                    owner._answer(self, json.loads(payload["messages"][-1]["content"])["RESPONSE"])
                finally:
                    with owner._lock:
                        owner._now -= 1

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = BusyHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler, response: str) -> None:
        order = response.splitlines()[-1]
        seen = sum(
            json.loads(payload["messages"][-1]["content"])["RESPONSE"] == response for _, payload in self.requests
        )
        if order.startswith("once "):
            order = order.removeprefix("once ") if seen == 1 else "yes"
        if order == "hang":
            self.leave.wait(30)
            return
        if order == "slow":
            time.sleep(0.2)
            order = "yes"
        status = int(order) if order.isdigit() else 200
        content = {"yes": '{"agree": "yes"}', "no": '{"agree": "no"}'}.get(order, order)
        body = (
            b"\xff\x00<html>"
            if order == "garbage"
            else json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        )
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if order == "drip":  # never late for any single byte
            for byte in body:
                if self.leave.wait(0.1):
                    return
                try:
                    handler.wfile.write(bytes([byte]))
                except OSError:
                    return
        handler.wfile.write(body)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave.set()
        self._server.shutdown()
        self._server.server_close()
