"""Several servers of one checkpoint on this machine: started, watched, started again when one dies or hangs.

A server that was started again has the checkpoint's weights; the trainer recognizes their version and sends the current
ones with its next weight sync. Simplification: it is watched from outside, by its health endpoint, which SGLang answers
by generating a token.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import call_each
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer, free_port

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  #: between two looks at the processes
_HEALTH_SECONDS = 10.0  #: between two requests for their health
_ANSWER_SECONDS = 25.0  #: for an answer; SGLang itself gives up after 20


@dataclass(frozen=True)
class SupervisorConfig:
    """How many servers, on what, and when they are started again."""

    count: int = 1  #: servers
    gpus: tuple[int, ...] = ()  #: they share these, tp for each server; empty: 0, 1, 2 … on cuda
    port: int = 0  #: of the first one; the others have the next; 0 takes free ones
    #: a server that is not healthy for so long is started again; longer than it is paused for a weight sync
    hang_seconds: float = 180.0
    max_failed_starts: int = 3  #: in a row, before the supervisor gives up
    log_dir: Path = Path("runs/servers")  #: of what servers print

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_failed_starts < 1 or self.hang_seconds <= 0:
            raise CordError("the number of servers and of failed starts must be at least 1, hang_seconds positive")


@dataclass(eq=False)
class Watched:
    """One server and what is known of it."""

    server: SglangServer
    name: str
    since: float = 0.0  #: when it was started, or last found healthy
    ready: bool = False
    failed_starts: int = 0
    starts: int = 0


@dataclass(eq=False)
class Supervisor:
    """A context manager: servers are started on entry and ended on exit.

    Args:
        config: of all servers.
        server: of each, but for its port and GPUs.
        api_key: that requests must bear.

    Raises:
        CordError: not enough GPUs are named, or servers would listen to other machines without a key.
    """

    config: SupervisorConfig
    server: ServerConfig
    api_key: str
    watched: list[Watched] = field(default_factory=list, init=False)
    _checked: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        count = self.config.count
        shares = share_gpus(self.config.gpus, count, self.server.tp) if self.server.device == "cuda" else [()] * count
        for index, gpus in enumerate(shares):
            self._add(index, gpus)

    @property
    def urls(self) -> list[str]:
        """Where the servers are, or will be once they are ready."""
        return [watched.server.url for watched in self.watched]

    @property
    def pids(self) -> list[int | None]:
        """Their first processes."""
        return [watched.server.pid for watched in self.watched]

    def __enter__(self) -> Self:
        for watched in self.watched:
            self._start(watched)
        return self

    def __exit__(self, *_: object) -> None:
        threads = [threading.Thread(target=watched.server.stop) for watched in self.watched]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set.

        Raises:
            CordError: a server cannot be started; with the last line of its log.
        """
        while not stop.wait(_LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Look at all servers once, and start again what is dead or hangs. Raises as `run`."""
        now = time.monotonic()
        for watched in self.watched:
            if not watched.server.running:
                self._restart(watched, f"ended: {watched.server.last_line()}")
        waiting = not all(watched.ready for watched in self.watched)
        if now - self._checked < (_LOOK_SECONDS if waiting else _HEALTH_SECONDS):
            return
        self._checked = now
        alive = {watched.server.endpoint: watched for watched in self.watched}
        healthy, _ = call_each(list(alive), lambda endpoint: endpoint.is_healthy(_ANSWER_SECONDS))
        for endpoint, watched in alive.items():
            if healthy.get(endpoint):
                if not watched.ready:
                    logger.info("%s %s: ready", watched.name, watched.server.url)
                watched.ready, watched.failed_starts, watched.since = True, 0, time.monotonic()
                continue
            limit = self.config.hang_seconds if watched.ready else self.server.start_timeout
            if time.monotonic() - watched.since > limit:
                self._restart(watched, f"not healthy for {limit:g} s")

    def _add(self, index: int, gpus: tuple[int, ...]) -> None:
        port = self.config.port + index if self.config.port else free_port(self.server.host)
        name = f"server {index}"
        log = self.config.log_dir / f"server-{socket.gethostname()}-{index}.log"
        self.watched.append(Watched(SglangServer(replace(self.server, port=port, gpus=gpus), self.api_key, log), name))

    def _start(self, watched: Watched) -> None:
        watched.ready, watched.since = False, time.monotonic()
        watched.starts += 1
        watched.server.start()
        logger.info("%s %s: starting, log %s", watched.name, watched.server.url, watched.server.log)

    def _restart(self, watched: Watched, why: str) -> None:
        watched.failed_starts += not watched.ready
        logger.warning("%s %s: %s", watched.name, watched.server.url, why)
        if watched.failed_starts >= self.config.max_failed_starts:
            raise CordError(
                f"{watched.name} failed to start {watched.failed_starts} times in a row ({why}); "
                f"see {watched.server.log}"
            )
        self._start(watched)


def share_gpus(gpus: Sequence[int], count: int, tp: int) -> list[tuple[int, ...]]:
    """Return each server's GPUs.

    Raises:
        CordError: there are not enough.
    """
    gpus = gpus or range(count * tp)
    if len(gpus) < count * tp:
        raise CordError(f"{count} servers of {tp} GPUs each need {count * tp}, {len(gpus)} are named")
    return [tuple(gpus[i * tp : (i + 1) * tp]) for i in range(count)]
