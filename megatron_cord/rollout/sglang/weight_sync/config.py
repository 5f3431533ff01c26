"""How weight sync is configured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class WeightSyncConfig:
    """How the trainer's weights reach the servers."""

    #: process_group: NCCL, gloo on CPU, across machines; shared_memory: servers on the trainer's machine; disk: a
    #: common file system
    transport: Literal["process_group", "shared_memory", "disk"] = "process_group"
    #: sent at once; two such buffers live on the main rank. A larger tensor has a bucket of its own
    bucket_bytes: int = 512 << 20
    #: process_group: one request announces all buckets, which are smaller then, where every server can take that; false
    #: sends one for each
    stream: bool = True
    overlap: bool = True  #: gather the next bucket while one is sent, which takes a second buffer
    #: for each bucket, and for joining the group; a server that takes longer counts as dead
    timeout_seconds: float = 300.0
    address: str | None = None  #: of the main rank, as servers reach it; found out if unset (process_group)
    #: that trainer and servers see under the same path; the system's temporary one if unset (disk)
    directory: Path | None = None
    #: after each weight sync all servers hash their weights, and must agree; takes seconds for a large model
    compare_checksums: bool = False

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1 << 20:
            # Tiny buckets cost a round trip each, and have garbled outputs: sglang issue 14178.
            raise CordError(
                f"bucket_bytes is {self.bucket_bytes}; it must be at least {1 << 20}, and some hundred MiB are best"
            )
        if self.timeout_seconds <= 0:
            raise CordError(f"timeout_seconds is {self.timeout_seconds}; it must be positive")
