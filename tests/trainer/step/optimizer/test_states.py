"""The optimizer's states as a checkpoint describes them, against Megatron's own description, which gathers them all."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.parallel.layout import initialize
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.optimizer import building, states
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.verify.layout import VerifyLayoutConfig
from megatron_cord.verify.layout_reference import make_checkpoint
from tests.gloo import run_ranks

SMALL = ["sizes.layers=2", "sizes.encoder_layers=1"]
CASES = {
    "dp4": [],
    "dp4 in bfloat16": ["model.dtype=bfloat16"],
    "dp4, moments on the host": ["optimizer.offload=true"],
    "tp2 dp2": ["parallel.tp=2"],
    "pp2 dp2, frozen encoder": ["parallel.pp=2", "model.freeze=[audio_encoder]"],
    "dp4, many buckets": ["optimizer.overlap_communication=true"],
}


@dataclass
class Described:
    """What one rank writes, by the parameter's number and the state's name: (key, replica, values)."""

    place: tuple[int, int]  #: tensor-parallel rank and stage
    ours: dict[tuple[int, str], tuple[str, int, Tensor]] = field(default_factory=dict)
    megatrons: dict[tuple[int, str], tuple[str, int, Tensor]] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)  #: the model's, by number
    exchanges: int = 0  #: portions that this rank sent or received


def describe(rank: int) -> dict[str, Described]:
    """Describe the states after a step, in each case."""
    found = {}
    for name, overrides in CASES.items():
        config = load_config(VerifyLayoutConfig, None, [*SMALL, *overrides])
        layout = initialize(config.parallel, config.seed)
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                building, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, bucket_size=5000)
            )
            patch.setattr(states, "PORTION", 100)
            make_checkpoint(Path(directory), config.sizes, config.seed)
            wrapped = wrap_model(config.optimizer, build_student(replace(config.model, checkpoint=directory), layout))
            optimizer, _ = build_optimizer(config.optimizer, wrapped, steps=2)
            for buffer in wrapped.buffers:
                buffer.grad_data.normal_(generator=torch.Generator().manual_seed(rank))
            optimizer.step()
            described = Described((torch.distributed.get_rank(layout.tp_group), layout.pp_rank))
            weights = wrapped.module.sharded_state_dict()
            exchange = states._exchange

            def counting(*arguments: Any, described: Described = described, exchange: Any = exchange) -> None:
                described.exchanges += 1
                exchange(*arguments)

            patch.setattr(states, "_exchange", counting)
            for index, inner in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
                assert isinstance(inner, states.StatesInPlace)
                for number, (parameter, _) in enumerate(inner._pieces()):
                    described.weights[1000 * index + number] = parameter.detach().clone()
                gathered = DistributedOptimizer.sharded_param_state_fully_reshardable(inner, weights, False, {})
                for into, state in (
                    (described.ours, inner.sharded_param_state_fully_reshardable(weights)),
                    (described.megatrons, gathered),
                ):
                    for number, leaves in state.items():
                        for kind, leaf in leaves.items():
                            assert isinstance(leaf, ShardedTensorFactory) or leaf.dtype == leaf.data.dtype
                            into[1000 * index + number, kind] = (leaf.key, leaf.replica_id[-1], leaf.data.clone())
            release(wrapped)
        found[name] = described
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.slow
def test_each_state_is_written_once_and_is_megatrons() -> None:
    """Catches a piece at another place, a state that no rank writes or two do, another name, and one rank with all.

    Also states that are gathered though they lie whole on a rank.
    """
    by_rank = run_ranks(describe, 4)
    for name in CASES:
        written: dict[tuple[int, int], dict[tuple[int, str], Tensor]] = defaultdict(dict)
        for rank in range(4):
            described = by_rank[rank][name]
            assert described.ours, f"{name}: rank {rank} writes nothing"
            for which, (key, replica, values) in described.ours.items():
                theirs, _, whole = described.megatrons[which]
                assert which not in written[described.place], f"{name}: two ranks write {key}"
                assert (key, replica, values.shape) == (theirs, 0, whole.shape)
                if which[1] == "param":
                    weight = described.weights[which[0]]
                    assert torch.equal(values.to(weight), weight), f"{name}: {key}"
                # Megatron-Core 0.16.1 takes values from wrong places where there is padding between buckets.
                if name != "dp4, many buckets":
                    assert torch.equal(values.cpu(), whole), f"{name}: {key}"
                written[described.place][which] = values
        for described in (by_rank[rank][name] for rank in range(4)):
            assert written[described.place].keys() == described.megatrons.keys()
    all_values = sum(values.numel() for _, _, values in by_rank[0]["dp4"].megatrons.values())
    assert 0 < by_rank[0]["dp4"].exchanges * 100 < all_values / 2
