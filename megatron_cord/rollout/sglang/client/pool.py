"""The servers' states on one rank: which gets the next request, which is suspect, which is lost.

A server that fails a request gets no new ones until a probe shows that it generates, with the weights that it should
have. One that cannot, or fails repeatedly, is lost until the next weight sync includes it again: its process may be a
new one, with the checkpoint's weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.rollout.sglang.client.endpoint import Endpoint

logger = logging.getLogger(__name__)

_PROBES = 3  #: failed ones that make a server lost
_RELAPSES = 3  #: suspicions since the last weight sync that make a server lost


@dataclass(eq=False)
class Server:
    """One server.

    Attributes:
        endpoint: where it is.
        state: "good" gets requests, "suspect" is probed, "lost" waits for a weight sync.
        in_flight: requests of this rank.
        probe_at: when to probe a suspect, on the monotonic clock.
    """

    endpoint: Endpoint
    state: Literal["good", "suspect", "lost"] = "good"
    in_flight: int = 0
    probe_at: float = 0.0
    _failed_probes: int = 0
    _relapses: int = 0

    def reset(self) -> None:
        """Count it as good: it has the weights that it should have."""
        self.state, self._failed_probes, self._relapses = "good", 0, 0

    def leave(self) -> None:
        """Count a request of this rank as over."""
        self.in_flight -= 1

    def fail(self, reason: str, *, slow: bool = False) -> None:
        """Count a request that failed, or that only takes long. Many fail together, which counts once."""
        if self.state != "good":
            return
        self._relapses += not slow
        self._failed_probes = 0
        self.state = "lost" if self._relapses > _RELAPSES else "suspect"
        self.probe_at = time.monotonic()
        until = "until the next weight sync" if self.state == "lost" else "for now"
        logger.warning("rollout: %s gets no requests %s: %s", self.endpoint.url, until, reason)

    def probed(self, problem: str | None) -> None:
        """Take the outcome of a probe; None if there is no problem."""
        if self.state != "suspect":
            return
        if problem is None:
            self.state = "good"
            logger.warning("rollout: %s generates again", self.endpoint.url)
            return
        self._failed_probes += 1
        self.probe_at = time.monotonic() + 2 ** (self._failed_probes - 1)
        if self._failed_probes >= _PROBES:
            self.lose(problem)

    def lose(self, reason: str) -> None:
        """Give it nothing until the next weight sync."""
        if self.state != "lost":
            logger.warning(
                "rollout: %s is left out until a weight sync has brought it the weights: %s", self.endpoint.url, reason
            )
        self.state = "lost"


@dataclass
class Pool:
    """The servers that the last weight sync found good, and what became of them since.

    Attributes:
        rank: of this process, so that ranks begin with different servers.
        servers: by address.
    """

    rank: int = 0
    servers: dict[str, Server] = field(default_factory=dict)

    def set(self, current: Iterable[Endpoint]) -> None:
        """Take the servers that have the weights after a weight sync; no others have."""
        wanted = list(current)
        turn = self.rank % len(wanted) if wanted else 0
        servers = {}
        for endpoint in wanted[turn:] + wanted[:turn]:
            server = self.servers.get(endpoint.url) or Server(endpoint)
            server.reset()
            servers[endpoint.url] = server
        self.servers = servers

    def choose(self, tried: Collection[Server]) -> Server | None:
        """Return the good server with the fewest requests of this rank, one that was not tried yet if there is any."""
        good = [server for server in self.servers.values() if server.state == "good"]
        return min(good, key=lambda server: (server in tried, server.in_flight), default=None)

    @property
    def all_lost(self) -> bool:
        """Whether no server is left before the next weight sync."""
        return all(server.state == "lost" for server in self.servers.values())

    def suspects(self) -> list[Server]:
        """Return those whose probe is due."""
        now = time.monotonic()
        return [server for server in self.servers.values() if server.state == "suspect" and server.probe_at <= now]
