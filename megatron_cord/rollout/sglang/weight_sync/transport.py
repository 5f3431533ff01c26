"""What a transport must offer; the weight sync around it is the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan


class AttemptFailedError(Exception):
    """What the servers share broke: it is unknown which of them got this bucket, so sending starts anew.

    Attributes:
        culprits: the servers that broke it, with what they did.
        why: what broke here.
    """

    def __init__(self, culprits: Mapping[Endpoint, ServerError], why: str = "") -> None:
        super().__init__("; ".join(str(error) for error in culprits.values()))
        self.culprits, self.why = dict(culprits), why


class WeightTransport(Protocol):
    """Sends buckets to servers. Used by rank 0 alone; `send` runs in a thread of its own, one call at a time.

    Attributes:
        in_session: whether servers require begin_weight_update and end_weight_update around it.
        borrows: whether a bucket may lie outside its buffer, in its only tensor's own memory.
    """

    in_session: bool
    borrows: bool

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        """Prepare sending to these servers.

        Returns:
            the most bytes that a bucket should have: bucket_bytes, or less where small ones cost nothing.

        Raises:
            AttemptFailedError: some servers cannot be reached by this transport.
        """
        ...

    def merges(self, servers: Sequence[Endpoint], base: str) -> bool:
        """Return whether all these servers take LoRA alone and merge it with this base.

        Args:
            servers: that would get it.
            base: `plugin.lora_merge.identity` of its weights.
        """
        ...

    def start(self, plans: Sequence[BucketPlan], lora_scale: float | None = None) -> None:
        """Prepare for these buckets, which are sent next in their order.

        Args:
            plans: the buckets.
            lora_scale: what multiplies B A, where LoRA is among them for servers to merge.
        """
        ...

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """Return memory for bucket number `index`, uint8 [≥ nbytes]; that of bucket index − 2 may be used again."""
        ...

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Send a bucket, until its memory may be used again; the servers that failed get nothing more.

        Args:
            plan: the place of each tensor.
            flat: uint8 [nbytes], as filled on the default stream.
            ready: recorded there after filling.

        Raises:
            AttemptFailedError: all servers failed because some did.
        """
        ...

    def finish(self) -> dict[Endpoint, ServerError]:
        """Complete what was sent, after the last bucket; return the servers that failed."""
        ...

    def abandon(self) -> None:
        """Clean up after an attempt that failed."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...


def merge_without_streams(servers: Sequence[Endpoint], base: str, timeout: float) -> bool:
    """Return whether all servers merge LoRA with this base over every transport.

    Args:
        servers: that would get it.
        base: as for `WeightTransport.merges`.
        timeout: seconds for each answer.
    """
    abilities, failures = call_each(servers, lambda server: server.abilities(timeout))
    return not failures and all(found.merges_any and found.base == base for found in abilities.values())
