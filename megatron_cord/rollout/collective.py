"""One engine a rank, used together: each generates its share of the requests and every rank gets all rollouts.

Every rank holds the same engine weights, so the shares are cut over all ranks, tensor-parallel ones included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine, VersionSpan


class CollectiveEngine:
    """A RolloutEngine whose calls are collective over all ranks.

    Args:
        engine: this rank's own.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """All ranks pass the same requests and get the same rollouts, in the requests' order."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = self._engine.generate(requests[rank::world])
        if world == 1:
            return mine
        shares = all_gather_json([asdict(rollout) for rollout in mine])
        return [_rollout(shares[i % world][i // world]) for i in range(len(requests))]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Every rank passes the full tensors."""
        self._engine.update_weights(tensors, version)

    def close(self) -> None:
        """Closes this rank's engine."""
        self._engine.close()


def _rollout(plain: dict[str, Any]) -> Rollout:
    """A rollout from JSON, which has lists for tuples."""
    return Rollout(
        prompt_id=plain["prompt_id"],
        token_ids=tuple(plain["token_ids"]),
        logprobs=tuple(plain["logprobs"]),
        finish_reason=plain["finish_reason"],
        versions=tuple(VersionSpan(**span) for span in plain["versions"]),
        text=plain["text"],
    )
