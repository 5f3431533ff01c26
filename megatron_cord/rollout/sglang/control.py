"""What is sent to the servers beside requests and weights: they are found, checked, paused. Rank 0 alone sends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.addresses import KEY_VARIABLE, Addresses
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each, without
from megatron_cord.rollout.sglang.client.pool import Pool
from megatron_cord.rollout.sglang.client.preflight import check_server, restore_base_weights

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  #: for an answer that takes no work
_CONTROL_SECONDS = 120.0  #: for pausing, or giving memory back
_BARRED = (401, 403)  #: HTTP's answers to a wrong key
_LOOK_SECONDS = 1.0  #: between two looks for servers


class Control:
    """Finds servers, checks each once, and passes commands to them.

    Args:
        addresses: where to look for them.
        model_type: that they must serve.
        start_seconds: for which too few servers are waited for.
    """

    def __init__(self, addresses: Addresses, model_type: str, start_seconds: float) -> None:
        self._addresses, self._model_type, self._start_seconds = addresses, model_type, start_seconds
        self._known: dict[str, int] = {}  # tokens that fit, of servers that were checked

    def connect(self, count: int) -> tuple[list[Endpoint], int]:
        """Return at least `count` servers, with the weights they were started with, and how many tokens they take.

        Raises:
            CordError: too few answer in time, or one cannot be used for training.
        """
        deadline = time.monotonic() + self._start_seconds
        while True:
            found = self.answering(deadline, count)
            _, failures = call_each(found, restore_base_weights)
            servers = without(found, failures)
            if len(servers) >= count:
                break
            why = "; ".join(str(error) for error in failures.values())
            if time.monotonic() > deadline:
                raise CordError(f"rollout servers do not take the checkpoint's weights again: {why}; start them anew")
            time.sleep(_LOOK_SECONDS)
        return servers, min(self._known[server.url] for server in servers)

    def answering(self, deadline: float, count: int = 1) -> list[Endpoint]:
        """Return the servers that answer now; wait until they are so many.

        Raises:
            CordError: it is too late, or one cannot be used for training.
        """
        logged = False
        while True:
            servers = self._addresses.find()
            good, lost = call_each(servers, self._check)
            if barred := [server.url for server, error in lost.items() if error.status in _BARRED]:
                raise CordError(
                    f"{', '.join(barred)} refuses the API key; set rollout.sglang.api_key_file or {KEY_VARIABLE} to "
                    "the servers' key"
                )
            if len(good) >= max(1, count):
                return [server for server in servers if server in good]
            if not logged:
                logger.warning(
                    "rollout: waiting for %d server%s (%s), %d of %d answer",
                    count, "s" * (count > 1), self._addresses.described, len(good), len(servers),
                )  # fmt: skip
                logged = True
            if time.monotonic() > deadline:
                why = "; ".join(str(error) for error in lost.values()) or "no address is known"
                raise CordError(
                    f"{len(good)} rollout servers answer, {count} are needed, after {self._start_seconds:g} s "
                    f"(rollout.sglang.start_seconds): {why}; start them with cord serve and look at "
                    "their logs"
                )
            time.sleep(_LOOK_SECONDS)

    def endpoints(self, urls: Iterable[str]) -> list[Endpoint]:
        """Return the servers with these addresses, on any rank."""
        return [Endpoint(url, self._addresses.key) for url in urls]

    def each(self, path: str, body: dict[str, Any], pool: Pool) -> None:
        """Send a command to all servers that are not lost; those that fail are lost. Rank 0 alone sends."""
        if dist.get_rank():
            return
        servers = {server.endpoint: server for server in pool.servers.values() if server.state != "lost"}
        _, failures = call_each(list(servers), lambda endpoint: endpoint.command(path, body, _CONTROL_SECONDS))
        for endpoint, error in failures.items():
            servers[endpoint].lose(str(error))

    def resume(self, pool: Pool) -> None:
        """Let all servers go on, those too that a weight sync left out while they were paused. Rank 0 alone sends."""
        self.each("/continue_generation", {}, pool)
        if dist.get_rank() == 0:
            others = [server for server in self._addresses.find() if server.url not in pool.servers]
            # Some may be gone, so failures do not count.
            call_each(others, lambda server: server.command("/continue_generation", {}, _ANSWER_SECONDS))

    def _check(self, server: Endpoint) -> None:
        server.weight_version(_ANSWER_SECONDS)
        if server.url not in self._known:
            # A server that an earlier run left paused does not answer as healthy.
            server.command("/continue_generation", {}, _ANSWER_SECONDS)
            if not server.is_healthy(_ANSWER_SECONDS):
                raise ServerError(f"{server.url} is not healthy yet")
            self._known[server.url] = check_server(server, self._model_type)
