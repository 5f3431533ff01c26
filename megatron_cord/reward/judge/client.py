"""One question to an OpenAI-compatible endpoint: POST {base_url}/chat/completions, with a limit on the whole exchange.

Simplification: no streaming, and a connection for each question.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

_LARGEST_REPLY = 1 << 20  # bytes


class RefusedError(Exception):
    """The endpoint will not answer this, however often it is asked: a wrong key, address or model."""


class NoAnswerError(Exception):
    """No usable answer this time.

    Attributes:
        retry: another try may help.
    """

    def __init__(self, reason: str, *, retry: bool = True) -> None:
        super().__init__(reason)
        self.retry = retry


def chat(base_url: str, payload: dict[str, Any], key: str | None, timeout: float) -> Any:
    """The content of the reply's first choice.

    Args:
        base_url: http(s)://host[:port]/v1.
        payload: of the request.
        key: sent as a bearer token; never part of an error.
        timeout: seconds for the question and its whole reply, and as many to connect.

    Raises:
        RefusedError: statuses 401, 403 and 404.
        NoAnswerError: no connection, no whole reply in time, another status than 200, or a reply that is not of this protocol.
    """
    parts = urlsplit(base_url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    # A socket's own timeout begins anew with every byte: this one ends the exchange as a whole.
    overdue = threading.Event()
    watchdog = threading.Timer(timeout, lambda: _cut(sock, overdue))
    watchdog.daemon = True
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.connect()
        sock = connection.sock  # the connection forgets it once the headers are read
        watchdog.start()
        connection.request("POST", parts.path.rstrip("/") + "/chat/completions", json.dumps(payload).encode(), headers)
        response = connection.getresponse()
        status, body = response.status, response.read(_LARGEST_REPLY + 1)
    except (OSError, http.client.HTTPException) as error:
        late = overdue.is_set() or isinstance(error, TimeoutError)
        reason = f"no whole reply within {timeout:g} s" if late else f"{type(error).__name__}: {error}"
        raise NoAnswerError(reason) from None
    finally:
        watchdog.cancel()
        connection.close()
    if overdue.is_set():
        raise NoAnswerError(f"no whole reply within {timeout:g} s")
    if status in (401, 403, 404):
        raise RefusedError(f"status {status}")
    if status != 200:
        raise NoAnswerError(f"status {status}", retry=status in (408, 409, 425, 429) or status >= 500)
    if len(body) > _LARGEST_REPLY:
        raise NoAnswerError(f"a reply of more than {_LARGEST_REPLY} bytes")
    return _content(body)


def _cut(sock: socket.socket, overdue: threading.Event) -> None:
    overdue.set()
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _content(body: bytes) -> Any:
    try:
        return json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise NoAnswerError("a reply that is not of the chat protocol") from None
