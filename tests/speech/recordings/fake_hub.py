"""A small HTTP server that stands for the Hugging Face Hub: one data set, its files and ranges of them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.rollout.sglang.fake_sglang import BusyHTTPServer

COMMIT = "1f" * 20


class FakeHub:
    """A context manager.

    Args:
        name: of the data set, OWNER/NAME.
        files: content by path.

    Attributes:
        url: its address, for HF_ENDPOINT.
        requests: method and path of all requests.
        broken: paths that are answered with status 500 from now on.
    """

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.requests: list[str] = []
        self.broken: set[str] = set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
                owner.requests.append(f"POST {self.path}")
                found = [path for path in paths if path in files or _is_folder(path)]
                self._json([_entry(path) for path in found])

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                owner.requests.append(f"{self.command} {path}")
                if re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
                    siblings = [{"rfilename": file} for file in files]
                    self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
                elif listed := re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+/?(.*)", path):
                    inside = f"{listed[1]}/" if listed[1] else ""
                    names = {file[len(inside) :].split("/")[0] for file in files if file.startswith(inside)}
                    recursive = "recursive=true" in self.path.lower()
                    whole = [file for file in files if file.startswith(inside)]
                    self._json([_entry(p) for p in (whole if recursive else sorted(inside + n for n in names))])
                elif (file := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path)) and file[1] in files:
                    self._file(file[1])
                else:
                    self._send(404, b"not found", {"X-Error-Code": "EntryNotFound"})

            def _file(self, path: str) -> None:
                if path in owner.broken:
                    self._send(400, b"broken", {})
                    return
                content, status = files[path], 200
                headers = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    first, last = int(span[1]), int(span[2] or len(content) - 1)
                    headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                    content, status = content[first : last + 1], 206
                self._send(status, content, headers)

            def _json(self, value: Any) -> None:
                self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        def _is_folder(path: str) -> bool:
            return path == "" or any(file.startswith(f"{path}/") for file in files)

        def _entry(path: str) -> dict[str, Any]:
            if path not in files:
                return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            return {"type": "file", "oid": f"{abs(hash(path)):040x}"[:40], "size": len(files[path]), "path": path}

        self._server = BusyHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
