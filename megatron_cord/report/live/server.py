"""The server of the live page of a run, or of several, for this machine alone.

It listens on the loopback address, answers GET and HEAD, and has a fixed set of paths: no part of an address ever
becomes a file's name. Requests under another name (DNS rebinding) are refused by their Host header. The policy sent
with each response allows the page requests to this server and its own scripts only. Every account of the machine can
open the page; it has no password.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

from megatron_cord.errors import CordError
from megatron_cord.report.live.live import LiveRun
from megatron_cord.report.live.several import LiveRuns
from megatron_cord.report.page.templates import asset

HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost", "[::1]")  # of this machine in a Host header, through a tunnel too
#: Path → asset and type.
_FILES = {
    "/style.css": ("shared/style.css", "text/css"),
    "/live.css": ("live/live.css", "text/css"),
    "/script.js": ("shared/script.js", "text/javascript"),
    "/live.js": ("live/live.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "style-src-attr 'unsafe-inline'; img-src data:; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class LivePage(Protocol):
    """What is served below one prefix."""

    def version(self) -> str:
        """Return what changes with the page's files."""
        ...

    def views(self, values: Mapping[str, str]) -> Mapping[str, Callable[[], str]]:
        """Return what draws each page, by its path; values are those of the address."""
        ...

    def clip(self, name: str, sample_id: str) -> bytes | None:
        """Return a recording of a data set; None if there is none."""
        ...

    def failed(self, message: str) -> str:
        """Return the page of an error."""
        ...


def make_server(directories: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Return a server of the runs' pages, listening but not yet answering; port 0 takes a free one.

    One run's page is at /. Of several, / has the comparison, and /1/, /2/, … have their own pages.

    Raises:
        CordError: not a run directory, or the port is taken or not permitted.
    """
    pages: dict[str, LivePage]
    if len(directories) == 1:
        pages = {"": LiveRun(directories[0])}
    else:
        several = LiveRuns(directories)
        pages = {"": several} | {f"/{number}": run for number, run in enumerate(several.runs, start=1)}
    handler = type("Handler", (_Handler,), {"pages": pages})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise CordError(
            f"cannot listen on port {port} ({getattr(error, 'strerror', None) or error}); give another with --port"
        ) from None


class _Handler(BaseHTTPRequestHandler):
    pages: Mapping[str, LivePage]
    server_version, sys_version = "megatron_cord", ""
    timeout = 30  # seconds for a request to arrive

    def do_GET(self) -> None:
        """Answer one request."""
        host = self.headers.get("Host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in _NAMES:
            return self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this server answers to localhost alone\n")
        try:
            address = urlsplit(self.path)
            values = dict(parse_qsl(address.query, max_num_fields=40))
        except ValueError:
            return self._send(HTTPStatus.BAD_REQUEST, "text/plain", b"not an address\n")
        number = re.fullmatch(r"(/\d{1,3})(/.*)", address.path)
        prefix, path = number.groups() if number else ("", address.path)
        if prefix not in self.pages:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
        page = self.pages[prefix]
        if path in _FILES:
            name, kind = _FILES[path]
            return self._send(HTTPStatus.OK, kind, asset(name).encode())
        if path == "/version":
            return self._send(HTTPStatus.OK, "application/json", json.dumps(page.version()).encode())
        if path == "/audio":
            return self._audio(page, values)
        views = page.views(values)
        if path not in views:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
        try:
            return self._page(HTTPStatus.OK, views[path]())
        except CordError as error:
            return self._page(HTTPStatus.BAD_REQUEST, page.failed(str(error)))

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def _audio(self, page: LivePage, values: Mapping[str, str]) -> None:
        try:
            wav = page.clip(values.get("set", ""), values.get("id", ""))
        except CordError as error:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", f"{error}\n".encode())
        if wav is None:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such recording\n")
        # A browser goes back in a recording only where it can ask for a part of it.
        part = re.fullmatch(r"bytes=(\d{1,12})-(\d{0,12})", self.headers.get("Range", ""))
        start, end = (int(part[1]), min(int(part[2] or len(wav)), len(wav) - 1)) if part else (0, len(wav) - 1)
        if not part or start > end:
            return self._send(HTTPStatus.OK, "audio/wav", wav, {"Accept-Ranges": "bytes"})
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end}/{len(wav)}"}
        return self._send(HTTPStatus.PARTIAL_CONTENT, "audio/wav", wav[start : end + 1], headers)

    def _page(self, status: HTTPStatus, page: str) -> None:
        self._send(status, "text/html", page.encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        text = kind.startswith(("text/", "application/"))
        headers = (
            _HEADERS
            | {"Content-Type": f"{kind}; charset=utf-8" if text else kind, "Content-Length": str(len(body))}
            | dict(more or {})
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal may be that of the run."""
