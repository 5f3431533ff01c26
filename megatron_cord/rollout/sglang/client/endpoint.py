"""One server over HTTP: JSON in, JSON out, and every failure in one line.

These are the requests beside generation (`batch` sends those): control, weight sync, health. Each has a connection of
    its
own, so that a server that was started again is not met through an old one.
"""

from __future__ import annotations

import functools
import ipaddress
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.plugin.lora_merge import ANY_TRANSPORT, BASE
from megatron_cord.rollout.sglang.plugin.weights import ABILITY

Result = TypeVar("Result")
_FLUSH_SECONDS = 5.0  #: for which a server may wait until it is idle
_MESSAGE_LIMIT = 300  #: characters of a server's error that are worth a line


class ServerError(Exception):
    """A server did not do what was requested.

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
        streams: whether it takes all buckets behind one request, as servers do that this project starts.
        base: the identity of the checkpoint's weights that it can merge LoRA with; None if it cannot.
        merges_any: whether it does so over every transport, and not from streams alone.
    """

    ranks: int
    streams: bool
    base: str | None = None
    merges_any: bool = False


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
        if "@" in parts.netloc:
            raise CordError(
                "a server's address holds a name or a password, which would reach logs; give its key in a file or in "
                "MEGATRON_CORD_SERVER_KEY"
            )
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise CordError(f"server address {self.url!r} is not of the form http://host:port")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            # The HTTP client would quote such a header in its error.
            raise CordError(f"the API key of server {self.url} has characters that no header can hold; set it again")
        if not self.api_key and not _is_loopback(parts.hostname):
            raise CordError(
                f"server {self.url} is not on this machine and has no API key; anyone could change its weights: "
                "give it one"
            )

    @property
    def host(self) -> str:
        """The host's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether it is reached over this machine's loopback."""
        return _is_loopback(self.host)

    @property
    def headers(self) -> dict[str, str]:
        """What identifies the sender to the server."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a JSON body and return the reply.

        Raises:
            ServerError: no reply within `timeout` seconds, one that is no JSON map, or a refusal.
        """
        return self._request("POST", path, json.dumps(body).encode(), timeout)

    def get(self, path: str, timeout: float) -> dict[str, Any]:
        """Return the reply; errors as with `post`."""
        return self._request("GET", path, None, timeout)

    def command(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """Post to an endpoint whose reply holds nothing beyond its status; errors as with `post`."""
        self._send("POST", path, json.dumps(body).encode(), timeout)

    def is_healthy(self, timeout: float) -> bool:
        """Return whether it answers at all."""
        try:
            self._send("GET", "/health", None, timeout)
        except ServerError as error:
            return error.status is not None and error.status < 500
        return True

    def abilities(self, timeout: float) -> Abilities:
        """Return how it can take weights.

        Raises:
            ServerError: as `post`; it runs several pipeline stages or replicas, which weight sync does not serve.
        """
        info = self.get("/server_info", timeout)
        for name in ("pp_size", "dp_size"):
            if info.get(name, 1) != 1:
                raise ServerError(
                    f"{self.url} runs with {name}={info[name]}; start it with 1, and more servers instead", 200
                )
        base = info.get(BASE)
        return Abilities(
            int(info.get("tp_size", 1)),
            info.get(ABILITY) is True,
            base if isinstance(base, str) else None,
            info.get(ANY_TRANSPORT) is True,
        )

    def weight_version(self, timeout: float) -> str:
        """Return the version that the server names for its weights."""
        return str(self.get("/model_info", timeout).get("weight_version"))

    def checksums(self, timeout: float) -> list[dict[str, str]]:
        """Return for each of its ranks the checksums of the model's tensors, by the server's own names."""
        ranks = self.post("/weights_checker", {"action": "checksum"}, timeout).get("ranks")
        try:
            return [{str(name): str(value) for name, value in rank["checksums"].items()} for rank in ranks or []]
        except (TypeError, LookupError, AttributeError):
            raise ServerError(
                f"{self.url}/weights_checker answered in another form than SGLang 0.5.21's", 200
            ) from None

    def flush_cache(self, timeout: float) -> None:
        """Drop what it computed for prompts with earlier weights.

        Responses that a pause has taken back may wait meanwhile.

        Raises:
            ServerError: as `post`; it is still generating.
        """
        try:
            self._send("POST", "/flush_cache?timeout=0", b"", timeout)
        except ServerError as error:
            if error.status != httpx.codes.BAD_REQUEST:
                raise
            # It still generates. SGLang lets responses wait, but only with a timeout of 0: so it comes second.
            self._send("POST", f"/flush_cache?timeout={_FLUSH_SECONDS:g}", b"", timeout)

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> dict[str, Any]:
        content = self._send(method, path, body, timeout)
        try:
            reply = json.loads(content)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise ServerError(f"{self.url}{path} answered no JSON map: {_shown(content)}", 200)
        if reply.get("success") is False:
            raise ServerError(f"{self.url}{path} failed: {reply.get('message')}", 200)
        return reply

    def _send(self, method: str, path: str, body: bytes | None, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json"} | self.headers
        try:
            response = _client().request(method, f"{self.url}{path}", content=body, headers=headers, timeout=timeout)
        except httpx.TimeoutException:
            raise ServerError(f"{self.url}{path} did not answer within {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url}{path} is unreachable: {type(error).__name__}: {error}") from None
        if response.status_code != httpx.codes.OK:
            raise ServerError(
                f"{self.url}{path} answered {response.status_code}: {_shown(response.content)}", response.status_code
            )
        return response.content


@functools.cache
def _client() -> httpx.Client:
    """Return the process's client for these requests.

    Any number run at once, no connection is kept, and proxies of the environment are ignored. Addresses are all
    http://, so certificates are not loaded.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.Client(limits=limits, trust_env=False, verify=False)


def call_each(
    servers: Sequence[Endpoint], call: Callable[[Endpoint], Result]
) -> tuple[dict[Endpoint, Result], dict[Endpoint, ServerError]]:
    """Call all servers at once; return their answers, and the failures of those that have none."""
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
    """Return the servers that are not among the failures."""
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
