"""One engine a rank, used together by a group of ranks: each generates its share of the group's requests.

All ranks' engines hold the same weights, so a group may be all ranks (evaluation) or the ranks that train the same
sequences (training), tensor-parallel ones included: each of them then generates a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Self, TypeVar

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.capabilities import Recoverable
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine, WeightSource

Item = TypeVar("Item")
_ROUNDS_IN_VAIN = 3  #: recoveries without a single response more


def finished(rollouts: Sequence[Rollout]) -> dict[int, Rollout]:
    """Return those that are whole, by index."""
    return {i: rollout for i, rollout in enumerate(rollouts) if rollout.finish_reason != "abort"}


class CollectiveEngine:
    """A RolloutEngine whose calls are collective.

    Args:
        engine: this rank's own.
        group: the ranks that share requests and get each other's rollouts; None for all ranks.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: RolloutEngine, group: dist.ProcessGroup | None = None) -> None:
        self.engine, self._group = engine, group

    def within(self, group: dist.ProcessGroup) -> Self:
        """Return the same engine for requests that the ranks of a group share; each group has its own."""
        return type(self)(self.engine, group)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """Generate one rollout a request. Collective over all ranks; those of a group pass the same requests.

        Returns:
            the rollouts of the group's requests, in their order, on each of its ranks.

        Raises:
            CordError: what the engine raises; responses that stay unfinished.
        """
        return self.generate_share(self.share(requests), len(requests))

    def generate_share(self, share: Sequence[GenerationRequest], count: int) -> list[Rollout]:
        """Do as `generate`, where each rank has made its own share of the group's `count` requests only."""
        made = finished(self.engine.generate(share))
        self.complete(share, made)
        return self.gather([made[i] for i in range(len(share))], count)

    def complete(self, share: Sequence[GenerationRequest], made: dict[int, Rollout]) -> None:
        """Generate what a rank's share lacks, once an engine that lost its means has got them back.

        Collective over all ranks; the trainer must still have the weights of the last update.

        Args:
            share: this rank's requests.
            made: finished rollouts by their index in it; filled.

        Raises:
            CordError: the engine cannot recover, or what is missing stays so.
        """
        if not isinstance(self.engine, Recoverable):
            if len(made) < len(share):
                raise CordError(
                    f"the engine cut off {len(share) - len(made)} responses without an abort; look at its log"
                )
            return
        in_vain, before = 0, -1
        while missing := sum(all_gather_json(len(share) - len(made))):
            in_vain = in_vain + 1 if missing == before else 0
            if in_vain == _ROUNDS_IN_VAIN:
                lacking = [request.prompt.sample_id for i, request in enumerate(share) if i not in made]
                raise CordError(
                    f"{missing} responses are still missing after the rollout engine was lost {_ROUNDS_IN_VAIN} times "
                    f"in a row, on this rank of samples {', '.join(lacking[:5]) or '(none)'}; look at the servers' logs"
                )
            before = missing
            self.engine.recover()
            missing_here = [i for i in range(len(share)) if i not in made]
            new = finished(self.engine.generate([share[i] for i in missing_here]))
            made.update({missing_here[i]: rollout for i, rollout in new.items()})

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's share of the group's requests, or of what belongs to them. Not collective."""
        return list(items[dist.get_rank(self._group) :: dist.get_world_size(self._group)])

    def gather(self, mine: list[Rollout], count: int) -> list[Rollout]:
        """Return all rollouts of the group's `count` requests in their order. Collective over the group."""
        size = dist.get_world_size(self._group)
        if size == 1:
            return mine
        shares = all_gather_json([asdict(rollout) for rollout in mine], self._group)
        return [Rollout.from_json(shares[i % size][i // size]) for i in range(count)]

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Pass each rank's source on to its engine."""
        self.engine.update_weights(source, version)

    def close(self) -> None:
        """Close this rank's engine."""
        self.engine.close()
