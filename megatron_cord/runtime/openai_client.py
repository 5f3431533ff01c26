"""Requests to an OpenAI-compatible endpoint that may be slow, busy or away: bounded tries, then one clear error.

An event loop in a thread of the client's own sends all requests, so that `timeout` bounds a whole exchange: a timeout
of the socket would begin anew with each byte. The callers' threads only wait.

What it simplifies: no streaming; a reply is held in memory, up to a limit.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from megatron_cord.errors import CordError

if TYPE_CHECKING:  # configurations name an endpoint long before it is called, and httpx takes 0.2 s to import
    import httpx

Value = TypeVar("Value")

_RETRIED_STATUSES = {408, 409, 425, 429}  # beside all from 500 on
_ACCESS_STATUSES = {401, 403, 404}
_REQUEST_STATUSES = {400, 413, 422}
_LONGEST_PAUSE = 30.0  # seconds
_SHOWN = 200  # characters of a reply in a message
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class EndpointError(CordError):
    """An endpoint does not serve, after all tries."""


class RequestRefusedError(EndpointError):
    """The endpoint finds fault with one request; it serves others."""


class AccessRefusedError(EndpointError):
    """The endpoint refuses the key, the address or the model, so every further request would fail as well."""


@dataclass(frozen=True)
class Patience:
    """How long an endpoint is waited for.

    Attributes:
        timeout: seconds for one try, connecting included.
        tries: of each request.
        backoff: seconds before the second try; doubled before each further one, with up to half of it at random on top.
    """

    timeout: float = 60.0
    tries: int = 5
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.tries < 1 or self.backoff < 0:
            raise CordError("timeout must be positive, tries at least 1, and backoff not negative")

    def pause(self, attempt: int) -> float:
        """Return the seconds before a try; `attempt` counts from 1 for the second one."""
        return min(self.backoff * 2.0 ** (attempt - 1) * (1 + random.random() / 2), _LONGEST_PAUSE)


class OpenAIClient:
    """Posts to one endpoint. Threads may share it.

    Args:
        url: address with the version, "http://127.0.0.1:8880/v1".
        api_key_env: the environment variable that holds the key; None or an unset one sends none. No message shows it.
        patience: timeout and tries.
        max_reply_bytes: a longer reply counts as a failed try.
        name: of the endpoint in messages about its address.

    Raises:
        CordError: the address is none, or holds a password; the key has characters that a header cannot hold.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        patience: Patience | None = None,
        max_reply_bytes: int = 1 << 26,
        name: str = "the endpoint's address",
    ) -> None:
        check_endpoint_url(url, name)
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._key = _read_key(api_key_env) if api_key_env else None
        self._max_reply_bytes = max_reply_bytes
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None

    def post(self, path: str, *, parse: Callable[[bytes], Value], **content: Any) -> Value:
        """Return what `parse` makes of the reply to a request.

        Args:
            path: below the address, "audio/speech".
            parse: turns the body of a reply into a value; a ValueError counts as a failed try.
            content: httpx's json, data or files.

        Raises:
            RequestRefusedError: the endpoint finds fault with this request.
            AccessRefusedError: it refuses the key, the address or the model.
            EndpointError: it is away, too slow or broken, after all tries.
        """
        address, problem = f"{self.url}/{path}", ""
        for attempt in range(self.patience.tries):
            if attempt:
                time.sleep(self.patience.pause(attempt))
            try:
                status, body = self._exchange(address, content)
            except _FailedTryError as error:
                problem = str(error)
                continue
            if status == 200:
                try:
                    return parse(body)
                except ValueError as error:
                    problem = self._without_key(str(error))
                    continue
            problem = f"status {status}: {self._shown(body)}"
            if status in _ACCESS_STATUSES:
                raise AccessRefusedError(f"{address} refuses the key, the address or the model ({problem})")
            if status in _REQUEST_STATUSES:
                raise RequestRefusedError(f"{address} refuses the request ({problem})")
            if status < 500 and status not in _RETRIED_STATUSES:
                break
        raise EndpointError(f"{address} does not serve ({problem})")

    def close(self) -> None:
        """End the connections; a later request begins new ones."""
        with self._lock:
            loop, client, self._loop, self._client = self._loop, self._client, None, None
        if loop is not None and client is not None:
            asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _exchange(self, address: str, content: dict[str, Any]) -> tuple[int, bytes]:
        """Make one try: the status and the body of the reply."""
        loop, client = self._started()
        return asyncio.run_coroutine_threadsafe(self._send(client, address, content), loop).result()

    async def _send(self, client: httpx.AsyncClient, address: str, content: dict[str, Any]) -> tuple[int, bytes]:
        import httpx

        body = bytearray()
        try:
            async with (
                asyncio.timeout(self.patience.timeout),
                client.stream("POST", address, **content) as response,
            ):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > self._max_reply_bytes:
                        raise _FailedTryError(f"a reply of more than {self._max_reply_bytes} bytes")
        except TimeoutError:
            raise _FailedTryError(f"no whole reply within {self.patience.timeout:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise _FailedTryError(self._without_key(f"{type(error).__name__}: {error}")) from None
        return response.status_code, bytes(body)

    def _started(self) -> tuple[asyncio.AbstractEventLoop, httpx.AsyncClient]:
        """Start the thread at the first request."""
        import httpx

        with self._lock:
            if self._loop is None or self._client is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=functools.partial(_run_loop, self._loop), daemon=True).start()
                self._client = httpx.AsyncClient(
                    headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                    timeout=None,
                    limits=httpx.Limits(max_connections=None),  # the callers bound the requests in flight
                    # The environment's proxy is for other machines.
                    trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
                )
            return self._loop, self._client

    def _shown(self, body: bytes) -> str:
        return self._without_key(" ".join(body[: 4 * _SHOWN].decode("utf-8", "replace").split()))[:_SHOWN]

    def _without_key(self, text: str) -> str:
        """Hide the key, which some endpoints quote when they refuse it."""
        return text.replace(self._key, "[key]") if self._key else text


class _FailedTryError(Exception):
    """No usable reply this time."""


def check_endpoint_url(url: str, name: str) -> None:
    """Check that `url` is an address of an endpoint that may be shown.

    Args:
        url: the address.
        name: of the setting or argument that gives it.

    Raises:
        CordError: it is not one.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        valid = False
    else:
        if "@" in parts.netloc:
            raise CordError(f"{name} holds a name or a password, which would reach logs; put the key in a variable")
    if not valid:
        raise CordError(f"{name} must look like http://host:port/v1, but is {url!r}")


def _read_key(variable: str) -> str | None:
    """Return the key in an environment variable; None for an empty or unset one."""
    key = os.environ.get(variable, "").strip()
    # The HTTP client would quote such a header in its error.
    if not (key.isascii() and key.isprintable()):
        raise CordError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key or None


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Serve a client's requests until it is closed."""
    try:
        loop.run_forever()
    finally:
        loop.close()
