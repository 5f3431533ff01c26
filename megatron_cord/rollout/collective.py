"""One engine a rank, used together: each generates its share of the requests and every rank gets all rollouts.

Every rank holds the same engine weights, so the shares are cut over all ranks, tensor-parallel ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.capabilities import Recoverable
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine, WeightSource, rollout_from_json

_ROUNDS_IN_VAIN = 3  #: recoveries without a single response more


def finished(rollouts: Sequence[Rollout]) -> dict[int, Rollout]:
    """Those that are whole, by their places."""
    return {i: rollout for i, rollout in enumerate(rollouts) if rollout.finish_reason != "abort"}


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
        """All ranks pass the same requests and get the same rollouts, in the requests' order.

        Raises:
            CordError: what the engine raises; responses that stay unfinished.
        """
        share = self.share(requests)
        made = finished(self.engine.generate(share))
        self.complete(share, made)
        return self.gather([made[i] for i in range(len(share))], len(requests))

    def complete(self, share: Sequence[GenerationRequest], made: dict[int, Rollout]) -> None:
        """Fills in what is missing of a rank's share, after an engine that lost its means has got them back. All ranks together; the trainer must
        still have the weights of the last update.

        Args:
            share: this rank's requests.
            made: finished rollouts by their places in it.

        Raises:
            CordError: the engine cannot recover, or what is missing stays so.
        """
        if not isinstance(self.engine, Recoverable):
            if len(made) < len(share):
                raise CordError(
                    f"the engine cut off {len(share) - len(made)} responses that nobody aborted; look at its log"
                )
            return
        in_vain, before = 0, -1
        while missing := sum(all_gather_json(len(share) - len(made))):
            in_vain = in_vain + 1 if missing == before else 0
            if in_vain == _ROUNDS_IN_VAIN:
                open_ = [request.prompt.sample_id for i, request in enumerate(share) if i not in made]
                raise CordError(
                    f"{missing} responses are still missing after the rollout engine was lost {_ROUNDS_IN_VAIN} times in a row, on this rank "
                    f"of samples {', '.join(open_[:5]) or '(none)'}; look at the servers' logs"
                )
            before = missing
            self.engine.recover()
            places = [i for i in range(len(share)) if i not in made]
            new = finished(self.engine.generate([share[i] for i in places]))
            made.update({places[i]: rollout for i, rollout in new.items()})

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

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Pass each rank's source on to its engine."""
        self.engine.update_weights(source, version)

    def close(self) -> None:
        """Closes this rank's engine."""
        self.engine.close()
