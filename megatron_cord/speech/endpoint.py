"""An OpenAI-compatible HTTP endpoint that may be slow, busy or away: retried with patience, and one clear error in the end."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from megatron_cord.errors import CordError

_WORTH_RETRYING = {408, 409, 425, 429, 500, 502, 503, 504}
_REFUSALS = {400, 413, 422}
_LONGEST_PAUSE = 30.0  # seconds


class RequestRefused(CordError):
    """The endpoint is well but will not serve this one request; others it will."""


class Endpoint:
    """Posts to one server; safe to share between threads.

    Args:
        url: address up to the version, "http://127.0.0.1:8880/v1".
        key_variable: environment variable that holds the key; unset means none. The key is never shown.
        timeout: seconds for one request.
        retries: of a request that fails for a passing reason; each waits twice as long.
    """

    def __init__(self, url: str, *, key_variable: str, timeout: float, retries: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise CordError(f"{url!r} is no address of an endpoint; write http://host:port/v1")
        key = os.environ.get(key_variable)
        self.url = url.rstrip("/")
        self._retries = retries
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout)

    def post(self, path: str, **content: Any) -> httpx.Response:
        """The answer to a request.

        Args:
            path: below the address, "audio/speech".
            content: httpx's json, data or files.

        Raises:
            RequestRefused: the endpoint finds fault with this request.
            CordError: it is away, too slow or broken, after all retries.
        """
        address, last = f"{self.url}/{path}", ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, _LONGEST_PAUSE))
            try:
                response = self._client.post(address, **content)
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == httpx.codes.OK:
                return response
            last = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code in _REFUSALS:
                raise RequestRefused(f"{address} refuses it ({last})")
            if response.status_code not in _WORTH_RETRYING:
                break
        raise CordError(
            f"{address} does not serve ({last}); what is complete is kept: call again when the endpoint is well"
        )

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()
