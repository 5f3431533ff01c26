"""What three ranks' processes run for the tests of layouts, of values exchanged as JSON, and of engines used together.

One start of the ranks serves all test modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.parallel import vocabulary_parts
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.parallel.objects import all_gather_json, broadcast_json
from megatron_cord.parallel.vocabulary_parts import collect_rows, spread_rows
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.types import GenerationRequest, Rollout, VersionSpan, WeightSource
from megatron_cord.rollout.weights import PlainWeights
from tests.gloo import run_ranks

WORLD_SIZE = 3
REQUEST_COUNTS = (0, 1, 3, 7)


class EchoEngine:
    """An engine that answers each request with its seed, and counts requests."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.version = 0
        self.closed = False

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """Return responses whose tokens are the seed, once and twice."""
        self.asked.append(len(requests))
        return [self._rollout(request.prompt.sample_id, request.seed) for request in requests]

    def _rollout(self, name: str, seed: int) -> Rollout:
        spans = (VersionSpan(0, 1, self.version), VersionSpan(1, 2, self.version + 1))
        return Rollout(
            name,
            (seed, 2 * seed),
            (-0.1 - 0.2 * seed, -math.inf),
            "stop" if seed % 2 else "length",
            spans,
            f"« {seed} »\n",
        )

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Take the version alone."""
        self.version = version + len(list(source.tensors(full=False)))

    def close(self) -> None:
        """Remembers it."""
        self.closed = True


def requests(count: int) -> list[GenerationRequest]:
    """Return requests named and seeded by their number."""
    return [GenerationRequest(Prompt(f"sample {i}", (1,)), 1.0, 4, seed=i) for i in range(count)]


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    refused: list[str]
    place: dict[str, Any]
    gathered: list[Any]
    gathered_in_group: list[Any]
    received: Any
    not_json: bool
    rollouts: dict[int, list[Rollout]]
    asked: list[int]
    engine: tuple[int, bool]
    part: Tensor
    summed: Tensor | None


def values(rank: int) -> Any:
    """Of very different lengths; with what JSON spells in other ways."""
    return [None, {"größe": [0.1 + 0.2, -math.inf, math.nan], "lines": 'a\n"b"\\ ✓'}, ["x" * 100_000, 2**60, True, ""]][
        rank
    ]


def run_all(rank: int) -> Seen:
    """Everything that needs three ranks."""
    refused = []
    for config in (ParallelConfig(tp=2), ParallelConfig(tp=2, pp=3)):
        try:
            initialize(config, seed=0)
        except CordError as error:
            refused.append(str(error))
    layout = initialize(ParallelConfig(pp=3, vocabulary_over_stages=True), seed=0)
    try:
        initialize(ParallelConfig(tp=3), seed=0)
    except RuntimeError as error:
        refused.append(str(error))
    place = {
        name: getattr(layout, name)
        for name in ("rank", "world_size", "pp_rank", "is_first_stage", "is_last_stage", "is_main", "last_stage_rank")
    }
    place["sizes"] = [
        dist.get_world_size(group) for group in (layout.tp_group, layout.pp_group, layout.dp_group, layout.solo)
    ]

    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    try:
        all_gather_json(object())
        not_json = False
    except TypeError:
        not_json = True
    gathered = all_gather_json(values(rank))
    gathered_in_group = all_gather_json((rank, "in group"), group=single if rank == 2 else pair)
    received = broadcast_json({"from": rank}, source=2)

    vocabulary_parts._BLOCK = 30  # so that ten rows travel at a time
    weight = torch.arange(64.0 * 3).view(64, 3) if layout.is_last_stage else None
    part = spread_rows(weight, 64, 3, torch.float32, layout)
    summed = None if weight is None else weight.clone()
    collect_rows(part * 2, summed, 64, layout)

    engine = EchoEngine()
    together = CollectiveEngine(engine)
    together.update_weights(PlainWeights({"name": Tensor()}), 4)
    rollouts = {count: together.generate(requests(count)) for count in REQUEST_COUNTS}
    together.close()
    return Seen(
        refused,
        place,
        gathered,
        gathered_in_group,
        received,
        not_json,
        rollouts,
        engine.asked,
        (engine.version, engine.closed),
        part,
        summed,
    )


@cache
def seen() -> list[Seen]:
    """By rank."""
    return run_ranks(run_all, WORLD_SIZE)
