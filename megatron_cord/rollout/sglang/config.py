"""How generation on SGLang servers is configured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class SGLangConfig:
    """Requests to the servers, and what is done about servers that fail."""

    max_in_flight: int = 256  #: requests at once, of all ranks together
    request_seconds: float = 300.0  #: for one response; then its server counts as hanging, and another one is used
    #: a request that takes longer is sent to another server too, and the first answer counts; null never
    reissue_seconds: float | None = 100.0
    tries: int = 4  #: of one request; a request that fails so often stops the run
    start_seconds: float = 450.0  #: for which servers are waited for: at the start, and when all are lost

    #: What rollout.on_weight_sync=continue does to unfinished responses: retract computes their keys and values anew,
    #: in_place keeps the old ones (SGLang then cannot drop its prefix cache either, so later prompts with the same
    #: beginning reuse older weights' values).
    pause: Literal["retract", "in_place"] = "retract"

    def __post_init__(self) -> None:
        if self.max_in_flight < 1 or self.tries < 1:
            raise CordError("rollout.sglang.max_in_flight and rollout.sglang.tries must be at least 1")
        seconds = (self.request_seconds, self.reissue_seconds, self.start_seconds)
        if any(value is not None and value <= 0 for value in seconds):
            raise CordError("rollout.sglang: request_seconds, start_seconds and reissue_seconds must be positive")
