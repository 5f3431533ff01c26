"""One engine a rank, used together: each generates its share of the requests and every rank gets all rollouts.

Every rank holds the same engine weights, so the shares are cut over all ranks, tensor-parallel ones included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine, rollout_from_json


class CollectiveEngine:
    """A RolloutEngine whose calls are collective over all ranks.

    Args:
        engine: this rank's own.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """All ranks pass the same requests and get the same rollouts, in the requests' order."""
        return self.gather(self.engine.generate(self.share(requests)), len(requests))

    def share(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """What this rank generates. Not collective."""
        return list(requests[dist.get_rank() :: dist.get_world_size()])

    def gather(self, mine: list[Rollout], count: int) -> list[Rollout]:
        """All rollouts in the requests' order, from each rank's for its share of so many requests."""
        world = dist.get_world_size()
        if world == 1:
            return mine
        shares = all_gather_json([asdict(rollout) for rollout in mine])
        return [rollout_from_json(shares[i % world][i // world]) for i in range(count)]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Every rank passes the full tensors."""
        self.engine.update_weights(tensors, version)

    def close(self) -> None:
        """Closes this rank's engine."""
        self.engine.close()
