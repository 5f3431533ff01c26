"""Print the parameters that a run trains, by the optimizer's groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import torch
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.convert.inventory import fake_model
from megatron_cord.convert.names import rename_to_global
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import choose_trained
from megatron_cord.trainer.step.optimizer.groups import check_groups, group_of, settings_of
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule


def list_parameters(file: Path, overrides: Sequence[str]) -> int:
    """Print a table of the groups and the names in them; return 0. Weights are not read.

    Raises:
        CordError: the configuration is wrong, there is no checkpoint, or a group has no parameter.
    """
    config = load_config(RunConfig, file, overrides)
    arch = load_architecture(config.model.checkpoint)
    check_groups(config.optimizer, arch, config.model)
    joined = torch.distributed.is_initialized()
    model = fake_model(arch, initialize(ParallelConfig(), seed=0))
    choose_trained(config.model, model, config.seed)
    schedule = RateSchedule.of(config.optimizer, config.train.steps)
    settings = settings_of(config.optimizer, schedule.factors, model)
    groups: dict[str | None, list[tuple[str, torch.nn.Parameter]]] = {name: [] for name in config.optimizer.groups}
    groups[None] = []
    for name, parameter in model.named_parameters():
        if parameter in settings:
            known = rename_to_global(model, name)
            groups[group_of(config.optimizer, known)].append((known, parameter))
    if joined:
        parallel_state.destroy_model_parallel()
    else:
        finalize()
    console = Console()
    table = Table("group", "learning rate", "weight decay", "tensors", "parameters")
    for group, members in groups.items():
        if members:
            decays = sorted({settings[parameter].weight_decay for _, parameter in members if parameter.dim() > 1})
            rate = schedule.peak * settings[members[0][1]].lr_mult
            count = sum(parameter.numel() for _, parameter in members)
            shown = ", ".join(f"{decay:g}" for decay in decays) or "0"
            table.add_row(group or "(none)", f"{rate:g}", shown, f"{len(members):,}", f"{count:,}")
    console.print(table)
    for group, members in groups.items():
        for name, parameter in members:
            sizes = " × ".join(str(size) for size in parameter.shape)
            console.print(f"{group or '-'}  {name}  {sizes}", highlight=False, markup=False, soft_wrap=True)
    return 0
