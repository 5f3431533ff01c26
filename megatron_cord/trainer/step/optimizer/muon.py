"""Muon for the matrices inside layers, AdamW for everything else: tables, norms, biases, convolutions.

Megatron's distributed optimizer cuts its buffers anywhere, and an update of Muon needs whole matrices. So with
`optimizer.distributed` each tensor is dealt to one data-parallel rank, which has its states and updates it for all.
Around both stand Megatron's wrappers: fp32 weights beside 16-bit ones, the global gradient norm, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.host_adam import HostAdam
from megatron_cord.parallel.muon import Muon
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.optimizer.groups import GroupSettings

Parameter = torch.nn.Parameter
_TABLES = ("language_model.embedding.", "language_model.output_layer.")


class DealtOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Optimizers of whole tensors, each of which one rank of a group updates for all.

    Args:
        optimizers: of this rank's tensors.
        owners: all tensors that this rank's model trains, with the rank of the group that updates each.
        group: the ranks that hold the same weights; None where each updates all of them.
    """

    def __init__(
        self,
        optimizers: list[MegatronOptimizer],
        owners: Sequence[tuple[Parameter, int]],
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(optimizers)
        self.owners, self.group = owners, group

    @torch.no_grad()
    def step(self) -> Any:
        """Update this rank's tensors and give them to the others. Collective."""
        result = super().step()
        if self.group is not None:
            for parameter, owner in self.owners:
                dist.broadcast(parameter.data, group=self.group, group_src=owner)
        return result

    def sharded_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return the states, each tensor's written by its owner, whatever its place among the data-parallel ranks."""
        state = super().sharded_state_dict(*arguments, **options)
        if self.group is not None:
            for leaf in nested_values(state):
                if hasattr(leaf, "replica_id"):
                    leaf.replica_id = (*leaf.replica_id[:-1], 0)
        return state


def build_muon(
    config: OptimizerConfig,
    megatron_config: MegatronOptimizerConfig,
    settings: dict[Parameter, GroupSettings],
    model: LALM,
) -> DealtOptimizer:
    """Build the optimizer of this rank's trained parameters. Collective.

    Args:
        config: its keys.
        megatron_config: what Megatron's wrappers need.
        settings: of each parameter (`groups.settings_of`).
        model: this rank's part.
    """
    groups = model.layout.groups
    dealt = config.distributed and groups.dp_cp.size() > 1
    owners = _deal(list(settings), groups.dp_cp.size() if dealt else 1)
    mine = [p for p, owner in owners if not dealt or owner == dist.get_rank(groups.dp_cp)]
    matrices = {p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith(_TABLES)}
    muon = config.muon
    optimizers = []
    if wanted := _param_groups([p for p in mine if p in matrices], settings, [p for p in settings if p in matrices]):
        inner = Muon(
            wanted,
            config.learning_rate,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            iterations=muon.iterations,
            scale=muon.scale,
            dtype=torch.bfloat16 if muon.precision == "bfloat16" else torch.float32,
            offload=config.offload,
            group=model.layout.tp_group,
        )
        optimizers.append(_wrap(inner, megatron_config, begin_states))
        # The wrapper of 16-bit weights has put fp32 ones in their place.
        inner.rows = {getattr(p, "main_param", p): rows for p, rows in _rows_of_fused(model).items()}
    if wanted := _param_groups(
        [p for p in mine if p not in matrices], settings, [p for p in settings if p not in matrices]
    ):
        adam = megatron.Adam(
            params=wanted,
            lr=config.learning_rate,
            weight_decay=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            adam_w_mode=True,
        )
        optimizers.append(_wrap(adam, megatron_config, _begin_adam))
    for optimizer in optimizers:
        optimizer.grad_stats_parallel_group = dist.group.WORLD if dealt else groups.mp
        optimizer.tp_group = groups.tp
    return DealtOptimizer(optimizers, owners, groups.dp_cp if dealt else None)


def _deal(parameters: Sequence[Parameter], ranks: int) -> list[tuple[Parameter, int]]:
    """Return the parameters with their owners: the largest first, each to the rank that has least so far."""
    loads = [0] * ranks
    owners: dict[Parameter, int] = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owners[parameter] = loads.index(min(loads))
        loads[owners[parameter]] += parameter.numel()
    return [(parameter, owners[parameter]) for parameter in parameters]


def _param_groups(
    mine: Sequence[Parameter], settings: dict[Parameter, GroupSettings], present: Sequence[Parameter]
) -> list[dict[str, Any]]:
    """Return Megatron's param groups of these parameters: the same groups on every rank, some of them empty.

    Args:
        mine: that this rank updates.
        settings: of all parameters.
        present: all parameters of this rank's model that this optimizer takes, also those that others update.
    """
    keys = {(s.lr_mult, s.weight_decay) for s in map(settings.__getitem__, present)}
    everywhere = sorted({(rate, decay) for share in all_gather_json(sorted(keys)) for rate, decay in share})
    return [
        {
            "params": [p for p in mine if (settings[p].lr_mult, settings[p].weight_decay) == (rate, decay)],
            "lr_mult": rate,
            "wd_mult": decay,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": True,
        }
        for rate, decay in everywhere
    ]


def _wrap(inner: torch.optim.Optimizer, config: MegatronOptimizerConfig, begin: Any) -> MegatronOptimizer:
    if config.bf16:
        return Float16OptimizerWithFloat16Params(inner, config, None, begin)
    return FP32Optimizer(inner, config, begin)


def _rows_of_fused(model: LALM) -> dict[Parameter, tuple[int, ...]]:
    """Return how many rows of each published matrix follow on one another in a fused one."""
    rows: dict[Parameter, tuple[int, ...]] = {}
    for module in model.modules():
        if (qkv := getattr(module, "linear_qkv", None)) is not None:
            width = module.config.kv_channels
            heads = module.config.num_attention_heads // module.config.num_query_groups
            rows[qkv.weight] = (heads * width, width, width)
        if (fc1 := getattr(module, "linear_fc1", None)) is not None and module.config.gated_linear_unit:
            half = fc1.weight.shape[0] // 2
            rows[fc1.weight] = (half, half)
    return rows


def begin_states(optimizer: Muon | HostAdam, config: Any = None) -> None:
    """Make all states of an optimizer, as Megatron's wrappers do before they load a checkpoint."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.begin(parameter)


def _begin_adam(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = ("exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {name: torch.zeros_like(parameter.data) for name in moments}
