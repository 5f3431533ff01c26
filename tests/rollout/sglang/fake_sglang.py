"""A server that speaks SGLang's protocol without a model, rightly or wrongly as it is told.

As a program (``fake_sglang.py --port N …``, other arguments ignored) it behaves until it is ended.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Reply = dict[str, Any]


def answer_to(prompt: Sequence[int]) -> list[int]:
    """Three words (ids 7 to 16) that depend on the whole prompt, then the end of the turn (3)."""
    code = sum((i + 1) * token for i, token in enumerate(prompt))
    return [7 + code // 10**digit % 10 for digit in range(3)] + [3]


class BusyHTTPServer(ThreadingHTTPServer):
    """A server to which many connect at once.

    Beyond the five that wait by default, the system resets connections when the machine is busy.
    """

    daemon_threads = True
    request_queue_size = 128


class FakeServer:
    """A context manager.

    Args:
        manner: what it does with a request: "good", "hang", "500", "garbage", "break" the connection, or a function
            from body to reply.
        key: that requests must bear.

    Attributes:
        asked: bodies of /generate.
        calls: (path, body) of everything else.
        most: requests in flight at once, at most.
        info: what /server_info and /model_info tell.
        loads: whether it takes weights from files.
        paused: whether it is; it then does not answer as healthy, and, as SGLang, flushes its cache at once or
            never.
    """

    def __init__(self, manner: str | Callable[[Reply], Reply] = "good", key: str = "", port: int = 0) -> None:
        self.manner, self.key = manner, key
        self.asked: list[Reply] = []
        self.calls: list[tuple[str, Reply]] = []
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        self.leave, self.seconds = threading.Event(), 0.0
        self.version, self.loads, self.paused = "default", True, False
        self.info: Reply = {
            "version": "0.5.21",
            "tp_size": 1,
            "max_req_input_len": 122,
            "model_type": "qwen2_audio",
            "tokenizer_path": "here",
        }
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
                    owner.send(self, 401, {"error": "Unauthorized"})
                    return
                path, _, query = self.path.partition("?")
                owner.handle(self, path, json.loads(content or b"{}"), query)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = BusyHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def handle(self, handler: BaseHTTPRequestHandler, path: str, body: Reply, query: str = "") -> None:
        """Answers one request."""
        if path == "/generate":
            probe = body.get("token_ids_logprob") is not None
            with self._lock:
                if not probe:
                    self.asked.append(body)
                self._now += 1
                self.most = max(self.most, self._now)
            try:
                self._generate(handler, body, probe)
            finally:
                with self._lock:
                    self._now -= 1
            return
        self.calls.append((path, body))
        if path == "/health" and self.manner == "hang":
            self.leave.wait(30)
            return
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
        if self.paused and path == "/health":
            self.send(handler, 503, {})
            return
        if self.paused and path == "/flush_cache" and query != "timeout=0":
            self.send(handler, 400, {"message": "Timed out waiting for idle state."})
            return
        if path == "/update_weight_version":
            self.version = body["new_version"]
        success = self.loads or path != "/update_weights_from_disk"
        self.send(handler, 200, {"success": success} | self.info | {"weight_version": self.version})

    def _generate(self, handler: BaseHTTPRequestHandler, body: Reply, probe: bool) -> None:
        if probe:
            self.send(
                handler,
                200,
                {"meta_info": {"output_token_ids_logprobs": [self.info.get("probe", [[-1.0, 0], [-2.0, 1]])]}},
            )
            return
        manner = self.manner
        self.leave.wait(30 if manner == "hang" else self.seconds)
        if manner in ("hang", "break"):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif manner == "500":
            self.send(handler, 500, {"error": "internal"})
        elif manner == "garbage":
            self.send(handler, 200, {"meta_info": {"finish_reason": {"type": "stop"}}})
        else:
            self.send(handler, 200, manner(body) if callable(manner) else self.good(body))

    def good(self, body: Reply, ids: list[int] | None = None, reason: str = "stop") -> Reply:
        """Return what SGLang would answer."""
        prompt = body.get("input_ids") or body["prompt"]
        limit = body["sampling_params"]["max_new_tokens"]
        ids = answer_to(prompt) if ids is None else ids
        if len(ids) > limit:
            ids, reason = ids[:limit], "length"
        meta = {
            "finish_reason": {"type": reason},
            "prompt_tokens": len(prompt),
            "weight_version": self.version,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    def send(self, handler: BaseHTTPRequestHandler, status: int, reply: Reply) -> None:
        """Write a reply; unless the client has left."""
        content = json.dumps(reply).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave.set()
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    with FakeServer(port=int(sys.argv[sys.argv.index("--port") + 1])):
        sys.stdin.read()
