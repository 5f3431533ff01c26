"""Which engine generates: the configuration's choice, and the engine itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_cord.errors import CordError
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.sglang.client.addresses import Addresses
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.engine import SGLangEngine
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig


@dataclass(frozen=True)
class EngineConfig:
    """Who generates, and where."""

    engine: Literal["local", "sglang"] = "local"  #: local: transformers in the trainer's processes; sglang: servers
    servers: tuple[str, ...] = ()  #: of sglang: http://host:port of each
    servers_file: Path | None = (
        None  #: instead: what tools/serve_rollout.py writes, or a directory of such files, one a node
    )
    min_servers: int = 1  #: so many must answer before the run starts
    api_key_file: Path | None = (
        None  #: of the servers; unset, the environment variable MEGATRON_CORD_SERVER_KEY holds the key, if there is one
    )
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)

    def __post_init__(self) -> None:
        if self.engine == "sglang" and bool(self.servers) == (self.servers_file is not None):
            raise CordError(
                "rollout.engine=sglang needs rollout.servers or rollout.servers_file, one of the two; "
                "tools/serve_rollout.py starts servers and writes such a file"
            )
        if self.min_servers < 1:
            raise CordError(f"rollout.min_servers is {self.min_servers}; it must be at least 1")

    @property
    def addresses(self) -> Addresses:
        """Where the servers are."""
        return Addresses(self.servers, self.servers_file, self.api_key_file)


def build_engine(config: EngineConfig, checkpoint_dir: str | Path, device: torch.device) -> CollectiveEngine:
    """The engine that the configuration names, with the checkpoint's own weights as version 0. All ranks call it together.

    Args:
        config: the choice.
        checkpoint_dir: the Hugging Face checkpoint, which servers run, too.
        device: of this rank, for the local engine.

    Raises:
        CordError: a checkpoint that the engine cannot run; servers that do not answer in time, or are not fit for training.
    """
    if config.engine == "local":
        return CollectiveEngine(LocalEngine(checkpoint_dir, LocalEngineConfig(device=str(device))))
    return CollectiveEngine(
        SGLangEngine(checkpoint_dir, config.addresses, config.sglang, config.weight_sync, config.min_servers)
    )
