"""Which layers a rank holds and in which order it works on them, against Megatron's own schedules."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.parallel.loss_slots import LossSlots, _Stretched
from megatron_cord.parallel.stages import chunks_of_rank, forward_order, group_size, joint_order, pass_order


def test_each_layer_is_on_one_rank() -> None:
    """Catches a layer on two ranks or on none, and chunks that tokens would pass in another order."""
    stages = ParallelConfig(pp=2, virtual_pp=3).layers_per_stage(12)
    ranks = [chunks_of_rank(stages, 2, rank) for rank in range(2)]
    assert ranks[0] == (range(0, 2), range(4, 6), range(8, 10))
    assert ranks[1] == (range(2, 4), range(6, 8), range(10, 12))
    assert chunks_of_rank(ParallelConfig(pp=4).layers_per_stage(12), 4, 3) == (range(9, 12),)
    uneven = ParallelConfig(pp=2, virtual_pp=2, pipeline_layers=(1, 4, 3, 4)).layers_per_stage(12)
    assert chunks_of_rank(uneven, 2, 0) == (range(1), range(5, 8))
    assert chunks_of_rank(uneven, 2, 1) == (range(1, 5), range(8, 12))


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [4, 5, 6, 7, 11])
def test_order_is_megatrons(pp: int, microbatches: int) -> None:
    """Catches a group that Megatron refuses, or larger than it need be, and passes in another order than its table."""
    size = group_size(microbatches, pp)
    left = microbatches % size
    assert pp <= size <= microbatches and (left == 0 or left >= pp) and size < 2 * pp + 1
    table = get_schedule_table(microbatches, 3, size)
    assert forward_order(microbatches, pp, 3) == [(chunk, number) for number, chunk in table]
    for rank in range(pp):
        order = pass_order(microbatches, pp, 3, rank)
        assert sorted(order) == [(b, c, n) for b in (False, True) for c in range(3) for n in range(microbatches)]
        place = {each: position for position, each in enumerate(order)}
        assert all(place[False, c, n] < place[True, c, n] for c in range(3) for n in range(microbatches))


def test_ranks_work_ahead_of_those_behind_them() -> None:
    """Catches more or fewer forward passes before the first backward pass than Megatron makes."""

    def ahead(rank: int, chunks: int) -> int:
        return next(place for place, each in enumerate(pass_order(8, 4, chunks, rank)) if each[0]) - 1

    assert [ahead(rank, 1) for rank in range(4)] == [3, 2, 1, 0]
    assert [ahead(rank, 2) for rank in range(4)] == [2 * (3 - rank) + 4 for rank in range(4)]


class Recorded(LossSlots):
    """The communicator without messages: what Megatron asks for becomes the rank's order."""

    def __init__(self, pp: int, rank: int, microbatches: int, order: list[tuple[str, int]]) -> None:
        self._behind, self._microbatches = pp - rank - 1, microbatches if rank < pp - 1 else 0
        self._joined = self._forward = self._backward = 0
        self._under_way = []
        self.config = SimpleNamespace(timers=None)
        self._join = lambda number: order.append(("loss", number))
        group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: pp)
        self.pp_group = _Stretched(group)

    def _post(self, *_: object) -> None:
        pass

    def _take(self, recv_prev: bool, recv_next: bool) -> tuple[None, None, None]:
        return None, None, None


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 9])
def test_losses_of_all_stages_in_megatrons_order(pp: int, microbatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a loss at another place than the plan's order, by running Megatron's own schedule, and a deadlock.

    Ranks that go through their orders together, each waiting for its neighbours' passes and all for each loss, must all
    come to the end.
    """
    orders = []
    for rank in range(pp):
        order: list[tuple[str, int]] = []
        run_schedule(pp, rank, microbatches, order, monkeypatch)
        assert order == joint_order(microbatches, pp, rank)
        assert [number for kind, number in order if kind == "loss"] == list(range(microbatches))
        orders.append(order)
    position, done, moved = [0] * pp, set[tuple[str, int, int]](), True
    while moved:
        ahead = [[*order, ("end", -1)][place] for order, place in zip(orders, position, strict=True)]
        together = len(set(ahead)) == 1
        free = [
            {
                "forward": rank == 0 or ("forward", rank - 1, number) in done,
                "backward": rank == pp - 1 or ("backward", rank + 1, number) in done,
                "loss": together,
                "end": False,
            }[kind]
            for rank, (kind, number) in enumerate(ahead)
        ]
        moved = any(free)
        for rank, (kind, number) in enumerate(ahead):
            if free[rank]:
                done.add((kind, rank, number))
                position[rank] += 1
    assert position == [3 * microbatches] * pp


def run_schedule(
    pp: int, rank: int, microbatches: int, order: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run Megatron's 1F1B of one rank, with passes that compute nothing and are noted."""
    forward, backward = iter(range(microbatches)), iter(range(microbatches))

    def forward_step(*_: object, **__: object) -> tuple[list[Tensor], int]:
        order.append(("forward", number := next(forward)))
        if rank == pp - 1:
            order.append(("loss", number))
        return [torch.zeros(1)], 0

    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", lambda *_, **__: order.append(("backward", next(backward))))
    monkeypatch.setattr(schedules, "deallocate_output_tensor", lambda *_: None)
    monkeypatch.setattr(schedules, "get_tensor_shapes", lambda **_: [(1, 1, 1)])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # else Megatron sees one stage
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = ProcessGroupCollection()
    for name in ("tp", "cp", "pp", "embd", "pos_embd", "dp_cp"):
        setattr(groups, name, group)
    model = MegatronModule(config)
    model.model_type = ModelType.encoder_or_decoder
    schedules.forward_backward_pipelining_without_interleaving(
        forward_step_func=None,
        data_iterator=None,
        model=[model],
        num_microbatches=microbatches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=Recorded(pp, rank, microbatches, order),
        pg_collection=groups,
    )
