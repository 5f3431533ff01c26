"""One server over HTTP, as the weight sync speaks with it: JSON in, JSON out, and every failure in one line."""

from __future__ import annotations

import http.client
import ipaddress
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.plugin.weights import ABILITY

Result = TypeVar("Result")
_FLUSH_SECONDS = 5.0  # for which a server may wait until it is idle
_MESSAGE_LIMIT = 300  # characters of a server's error that are worth a line


class ServerError(Exception):
    """A server did not do what it was asked.

    Attributes:
        status: its HTTP status; None if there was no answer at all: dead, hanging, or not speaking HTTP.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Abilities:
    """How a server can take weights.

    Attributes:
        ranks: processes over which its model is sharded.
        streams: it takes all buckets behind one request, as those do that this project starts.
    """

    ranks: int
    streams: bool


@dataclass(frozen=True)
class Endpoint:
    """Where a server is.

    Attributes:
        url: http://host:port.
        api_key: sent with each request, never shown; a server that is not on this machine must have one.
    """

    url: str
    api_key: str = field(default="", repr=False, metadata={"secret": True})

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise CordError(f"server address {self.url!r} is not of the form http://host:port")
        if not self.api_key and not _is_loopback(parts.hostname):
            raise CordError(
                f"server {self.url} is not on this machine and has no API key; anyone could change its weights: give it one"
            )

    @property
    def host(self) -> str:
        """Its host's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether it is reached over this machine's loopback."""
        return _is_loopback(self.host)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to a JSON body.

        Raises:
            ServerError: no reply within `timeout` seconds, one that is no JSON map, or a refusal.
        """
        return self._request("POST", path, json.dumps(body).encode(), timeout)

    def get(self, path: str, timeout: float) -> dict[str, Any]:
        """The reply; errors as with `post`."""
        return self._request("GET", path, None, timeout)

    def command(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """As `post`, for endpoints whose reply says nothing beyond its status."""
        self._exchange("POST", path, json.dumps(body).encode(), timeout)

    def is_healthy(self, timeout: float) -> bool:
        """Whether it answers at all."""
        try:
            self._exchange("GET", "/health", None, timeout)
        except ServerError as error:
            return error.status is not None and error.status < 500
        return True

    def abilities(self, timeout: float) -> Abilities:
        """How it can take weights.

        Raises:
            ServerError: as `post`; it runs several pipeline stages or replicas, which this project does not feed.
        """
        info = self.get("/server_info", timeout)
        for name in ("pp_size", "dp_size"):
            if info.get(name, 1) != 1:
                raise ServerError(
                    f"{self.url} runs with {name}={info[name]}; start it with 1, and more servers instead", 200
                )
        return Abilities(int(info.get("tp_size", 1)), info.get(ABILITY) is True)

    def weight_version(self, timeout: float) -> str:
        """The version that it says its weights have."""
        return str(self.get("/model_info", timeout).get("weight_version"))

    def checksums(self, timeout: float) -> list[dict[str, str]]:
        """Of each tensor of its model, by the server's own names, a map for each of its ranks."""
        ranks = self.post("/weights_checker", {"action": "checksum"}, timeout).get("ranks")
        try:
            return [{str(name): str(value) for name, value in rank["checksums"].items()} for rank in ranks or []]
        except (TypeError, LookupError, AttributeError):
            raise ServerError(
                f"{self.url}/weights_checker answered in another form than SGLang 0.5.21's", 200
            ) from None

    def flush_cache(self, timeout: float) -> None:
        """Drops what it computed for prompts with earlier weights. Responses that a pause has taken back may wait meanwhile.

        Raises:
            ServerError: as `post`; it is still generating.
        """
        try:
            self._exchange("POST", "/flush_cache?timeout=0", b"", timeout)
        except ServerError as error:
            if error.status != http.client.BAD_REQUEST:
                raise
            # It generates yet. SGLang lets responses wait, but only where it is not asked to wait itself.
            self._exchange("POST", f"/flush_cache?timeout={_FLUSH_SECONDS:g}", b"", timeout)

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> dict[str, Any]:
        content = self._exchange(method, path, body, timeout)
        try:
            reply = json.loads(content)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise ServerError(f"{self.url}{path} answered no JSON map: {_shown(content)}", 200)
        if reply.get("success") is False:
            raise ServerError(f"{self.url}{path} failed: {reply.get('message')}", 200)
        return reply

    def _exchange(self, method: str, path: str, body: bytes | None, timeout: float) -> bytes:
        parts = urlsplit(self.url)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        )
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 0, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except TimeoutError:
            raise ServerError(f"{self.url}{path} did not answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path} is unreachable: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ServerError(f"{self.url}{path} answered {response.status}: {_shown(content)}", response.status)
        return content


def ask_each(
    servers: Sequence[Endpoint], call: Callable[[Endpoint], Result]
) -> tuple[dict[Endpoint, Result], dict[Endpoint, ServerError]]:
    """Asks all servers at once; their answers, and the failures of those that have none."""
    answers: dict[Endpoint, Result] = {}
    failures: dict[Endpoint, ServerError] = {}
    if servers:
        with ThreadPoolExecutor(len(servers)) as pool:
            for server, future in [(server, pool.submit(call, server)) for server in servers]:
                try:
                    answers[server] = future.result()
                except ServerError as error:
                    failures[server] = error
    return answers, failures


def without(servers: Iterable[Endpoint], failures: Iterable[Endpoint]) -> list[Endpoint]:
    """The servers that are not among the failures."""
    lost = set(failures)
    return [server for server in servers if server not in lost]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    return text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + "…"
