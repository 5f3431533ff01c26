"""What a way of sending must offer; the weight sync around it is the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan


class AttemptFailed(Exception):
    """The servers share what broke: none of them got this bucket for certain, and the weight sync starts anew with those that live.

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
        in_session: whether servers want begin_weight_update and end_weight_update around it.
        borrows: whether a bucket may lie outside its buffer, in its only tensor's own memory.
    """

    in_session: bool
    borrows: bool

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        """Gets ready to send to these servers. Returns what a bucket should have at most: bucket_bytes, or less where small ones cost nothing.

        Raises:
            AttemptFailed: some servers cannot be reached this way.
        """
        ...

    def start(self, plans: Sequence[BucketPlan]) -> None:
        """Gets ready for these buckets, which are sent next in their order."""
        ...

    def buffer(self, index: int, nbytes: int) -> Tensor:
        """Where bucket number `index` is put together: uint8 [≥ nbytes]; the one of bucket index − 2 may be used again."""
        ...

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        """Returns when the bucket's memory may be used again; the servers that failed get nothing more.

        Args:
            plan: what lies where.
            flat: uint8 [nbytes], as filled on the default stream.
            ready: recorded there after filling.

        Raises:
            AttemptFailed: all servers failed because some did.
        """
        ...

    def finish(self) -> dict[Endpoint, ServerError]:
        """After the last bucket; the servers that failed."""
        ...

    def abandon(self) -> None:
        """Cleans up after an attempt that failed."""
        ...

    def close(self) -> None:
        """Frees everything; safe to call twice."""
        ...
