"""One call of ``generate``: all its requests, spread over the servers, until each is answered or no server is left.

Requests run as coroutines of one event loop in the calling thread. Each is answered once: its answers are taken one by
one, a copy that was sent to a second server is withdrawn when the other one is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import httpx

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.client.partial_response import PartialResponse
from megatron_cord.rollout.sglang.client.pool import Pool, Server
from megatron_cord.rollout.sglang.client.protocol import BadReplyError
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.types import Rollout

_PROBE_SECONDS = 20.0  #: for a probe's single token
_TICK = 0.1  #: seconds between two looks at the servers
_REFUSED = (400, 401, 403, 404, 413, 422)  #: the request is wrong, not the server


class State(Protocol):
    """What a running batch reads of the engine."""

    @property
    def paused(self) -> bool:
        """Whether the servers are; time does not count then."""
        ...

    @property
    def weight_version(self) -> int:
        """Of the last weight sync."""
        ...

    def version_of(self, name: str) -> int | None:
        """Return what a server's name for its weights means; None if it is of no weight sync."""
        ...


class _AttemptError(Exception):
    """This server did not answer this request."""


class _AllLostError(Exception):
    """All servers are lost."""


class Batch:
    """The requests of one call; used once.

    Args:
        responses: one for each request.
        pool: servers.
        config: limits.
        max_in_flight: requests of this rank at once.
        state: of the engine.
    """

    def __init__(
        self, responses: Sequence[PartialResponse], pool: Pool, config: SGLangConfig, max_in_flight: int, state: State
    ) -> None:
        self._responses, self._pool, self._config, self._state = responses, pool, config, state
        self._slots = asyncio.Semaphore(max_in_flight)
        self._name, self._numbers = secrets.token_hex(6), itertools.count()
        self._withdrawals: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._aborted = False

    def run(self) -> dict[int, Rollout]:
        """Return the rollouts by their responses' indices, without those that were aborted or had no server left.

        Raises:
            CordError: a request that servers refuse, or that fails time and again.
        """
        return asyncio.run(self._run())

    def abort(self) -> None:
        """Let `run` return soon; called from another thread."""
        self._aborted = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> dict[int, Rollout]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=10.0)
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
            self._client = client
            self._tasks = [asyncio.create_task(self._complete(response)) for response in self._responses]
            self._loop = asyncio.get_running_loop()
            if self._aborted:
                self._cancel()
            watch = asyncio.create_task(self._watch())
            try:
                pending = set(self._tasks)
                while pending:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
                    for error in (task.exception() for task in done if not task.cancelled()):
                        if error is not None and not isinstance(error, _AllLostError):
                            raise error
            finally:
                self._cancel()
                watch.cancel()
                await asyncio.gather(*self._tasks, watch, return_exceptions=True)
                if self._withdrawals:
                    await asyncio.wait(self._withdrawals, timeout=5.0)
        return {i: part.rollout() for i, part in enumerate(self._responses) if part.finish_reason is not None}

    async def _complete(self, response: PartialResponse) -> None:
        """Send requests until the response is whole."""
        async with self._slots:
            whole, failures = False, 0
            tried: list[Server] = []
            while not whole:
                lowest = self._state.weight_version
                try:
                    reply, server = await self._race(response.next_request(), tried)
                    try:
                        whole = response.add(reply, partial(self._version, lowest))
                    except (BadReplyError, _AttemptError) as error:
                        server.fail(f"{error}")
                        raise _AttemptError(f"{server.endpoint.url}: {error}") from None
                except _AttemptError as error:
                    failures += 1
                    if failures >= self._config.tries:
                        sample = response.request.prompt.sample_id
                        raise CordError(
                            f"sample {sample}: {failures} tries to generate a response failed (rollout.sglang.tries); "
                            f"the last one: {error}"
                        ) from None

    async def _race(self, body: dict[str, Any], tried: list[Server]) -> tuple[Any, Server]:
        """Return the first reply and its server: of one server, or of two where the first one takes long."""
        racers: dict[asyncio.Task[Any], Server] = {}
        limit, reissue = self._config.request_seconds, self._config.reissue_seconds
        spent = 0.0
        error: BaseException | None = None
        try:
            first = await self._server(tried)
            racers[self._start(first, body, tried)] = first
            while racers:
                due = min(limit, reissue) if reissue is not None and len(racers) == 1 and error is None else limit
                step = min(1.0, max(due - spent, 0.01))
                done, _ = await asyncio.wait(racers, timeout=step, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    server = racers.pop(task)
                    if task.exception() is None:
                        return task.result(), server
                    error = task.exception()
                if not done and not self._state.paused:
                    spent += step
                if spent >= limit:
                    for server in racers.values():
                        server.fail(f"no response within {limit:g} s (rollout.sglang.request_seconds)")
                    raise _AttemptError(f"no response within {limit:g} s")
                if reissue is not None and spent >= reissue and len(racers) == 1:
                    reissue = None
                    (slow,) = racers.values()
                    reason = f"a response takes more than {spent:g} s; it is requested from another server, too"
                    slow.fail(reason, slow=True)
                    if (other := self._pool.choose([slow])) is not None:
                        racers[self._start(other, body, tried)] = other
        finally:
            for task in racers:
                task.cancel()
            await asyncio.gather(*racers, return_exceptions=True)
        assert error is not None
        raise error

    def _start(self, server: Server, body: dict[str, Any], tried: list[Server]) -> asyncio.Task[Any]:
        tried.append(server)
        server.in_flight += 1
        task = asyncio.create_task(self._post(server, body | {"rid": f"{self._name}-{next(self._numbers)}"}))
        task.add_done_callback(lambda _: server.leave())
        return task

    async def _server(self, tried: list[Server]) -> Server:
        while True:
            if (server := self._pool.choose(tried)) is not None:
                return server
            if self._pool.all_lost:
                raise _AllLostError
            await asyncio.sleep(_TICK)

    async def _post(self, server: Server, body: dict[str, Any]) -> Any:
        url = f"{server.endpoint.url}/generate"
        try:
            response = await self._client.post(url, json=body, headers=server.endpoint.headers)
            text = " ".join(response.text[:300].split())
            if response.status_code in _REFUSED:
                raise CordError(f"{url} refuses a request ({response.status_code}): {text}")
            if response.status_code != httpx.codes.OK:
                raise _AttemptError(f"answered {response.status_code}: {text}")
            try:
                return response.json()
            except ValueError:
                raise _AttemptError(f"answered no JSON: {text}") from None
        except httpx.HTTPError as error:
            server.fail(f"{type(error).__name__} {error}".strip())
            raise _AttemptError(f"{url}: {type(error).__name__} {error}".strip()) from None
        except _AttemptError as error:
            server.fail(str(error))
            raise _AttemptError(f"{url} {error}") from None
        except asyncio.CancelledError:
            self._withdrawals.add(asyncio.create_task(self._withdraw(server.endpoint, body["rid"])))
            raise

    async def _withdraw(self, endpoint: Endpoint, rid: str) -> None:
        """Free the server of a request whose answer is not needed any more."""
        with contextlib.suppress(httpx.HTTPError):  # the server is gone, and the request with it
            await self._client.post(
                f"{endpoint.url}/abort_request", json={"rid": rid}, headers=endpoint.headers, timeout=5.0
            )

    def _version(self, lowest: int, name: str) -> int:
        version = self._state.version_of(name)
        if version is None or not lowest <= version <= self._state.weight_version:
            raise _AttemptError(
                f"generated with weights {name!r}, where version {self._state.weight_version} is needed"
            )
        return version

    async def _watch(self) -> None:
        """Probe suspect servers."""
        while True:
            if not self._state.paused:  # a paused server generates nothing
                suspects = self._pool.suspects()
                problems = await asyncio.gather(*(self._problem(server.endpoint) for server in suspects))
                for server, problem in zip(suspects, problems, strict=True):
                    server.probed(problem)
            await asyncio.sleep(_TICK)

    async def _problem(self, endpoint: Endpoint) -> str | None:
        """Return why a server cannot be used; None if it generates, with the present weights."""
        settings: Any = {"headers": endpoint.headers, "timeout": _PROBE_SECONDS}
        try:
            health = await self._client.get(f"{endpoint.url}/health", **settings)
            info = await self._client.get(f"{endpoint.url}/model_info", **settings)
            name = str(info.json()["weight_version"])
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}".strip()
        except (ValueError, LookupError, TypeError):
            return "it answers no JSON map"
        if health.status_code != httpx.codes.OK:
            return f"it is not healthy ({health.status_code})"
        if self._state.version_of(name) != self._state.weight_version:
            return f"it has weights {name!r}, not version {self._state.weight_version}"
        return None
