"""How generation on SGLang servers is configured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class SGLangConfig:
    """Where the servers are, requests to them, and what is done about servers that fail."""

    servers: tuple[str, ...] = ()  #: http://host:port of each
    #: instead: what cord serve writes, or a directory of such files, one a node
    servers_file: Path | None = None
    min_servers: int = 1  #: so many must answer before the run starts
    #: the servers' key; unset, the environment variable MEGATRON_CORD_SERVER_KEY holds the key, if there is one
    api_key_file: Path | None = None
    max_in_flight: int = 256  #: requests at once, of all ranks together
    request_seconds: float = 300.0  #: for one response; then its server counts as hanging, and another one is used
    #: a request that takes longer is sent to another server too, and the first answer counts; null never
    reissue_seconds: float | None = 100.0
    tries: int = 4  #: of one request; a request that fails so often stops the run
    start_seconds: float = 450.0  #: for which servers are waited for: at the start, and when all are lost

    #: What rollout.schedule.on_weight_sync=continue does to unfinished responses: retract computes their keys and
    #: values anew, in_place keeps the old ones (SGLang then cannot drop its prefix cache either, so later prompts with
    #: the same beginning reuse older weights' values).
    pause: Literal["retract", "in_place"] = "retract"

    def __post_init__(self) -> None:
        if self.min_servers < 1:
            raise CordError(f"rollout.sglang.min_servers is {self.min_servers}; it must be at least 1")
        if self.max_in_flight < 1 or self.tries < 1:
            raise CordError("rollout.sglang.max_in_flight and rollout.sglang.tries must be at least 1")
        seconds = (self.request_seconds, self.reissue_seconds, self.start_seconds)
        if any(value is not None and value <= 0 for value in seconds):
            raise CordError("rollout.sglang: request_seconds, start_seconds and reissue_seconds must be positive")
