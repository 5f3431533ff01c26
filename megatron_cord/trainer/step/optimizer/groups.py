"""Which parameters have a learning rate or a weight decay of their own: `optimizer.groups` by name.

A parameter's name is the one in the whole model, layers numbered over all pipeline stages, so that a pattern means the
same on every layout. A pattern that matches no parameter that is trained is an error, found from the architecture
alone before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_cord.convert.names import rename_to_global
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.families import family_of
from megatron_cord.model.lalm import LALM
from megatron_cord.model.lora.targets import find_targets
from megatron_cord.model.patterns import matches, nearest
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig


@dataclass(frozen=True)
class GroupSettings:
    """What the optimizer does with a parameter.

    Attributes:
        lr_mult: its learning rate as a multiple of the schedule's.
        weight_decay: of it.
    """

    lr_mult: float
    weight_decay: float


def group_of(config: OptimizerConfig, name: str) -> str | None:
    """Return the first group that matches a parameter, by its name in the whole model; None if none does."""
    return next((group for group, given in config.groups.items() if matches(given.match or group, name)), None)


def check_groups(config: OptimizerConfig, arch: Architecture, model: ModelConfig) -> None:
    """Refuse a group that no parameter is in.

    Args:
        config: with the groups.
        arch: of the model.
        model: which of its parts are trained, and how.

    Raises:
        CordError: it names what the pattern may have meant.
    """
    if not config.groups:
        return
    rules = family_of(arch).tensor_map(arch).rules
    names = [rule.megatron for rule in rules]
    trained = [name for name in names if name.partition(".")[0] in model.trained_parts]
    untrained = "model.freeze leaves"
    if model.lora.enabled:
        untrained = "model.lora leaves"
        added = [n for target in find_targets(arch, model.lora, model.freeze) for n in target.names().values()]
        trained, names = trained + added, names + added
    members = {group_of(config, name) for name in trained}
    for group, given in config.groups.items():
        if group in members:
            continue
        pattern = given.match or group
        if matching := [name for name in trained if matches(pattern, name)]:
            taken = group_of(config, matching[0])
            reason = f"matches only parameters that the group {taken} before it takes"
        elif matching := [name for name in names if matches(pattern, name)]:
            reason = f"matches only parameters that {untrained} untrained, such as {matching[0]}"
        elif found := next((rule for rule in rules if any(matches(pattern, n) for n in rule.hf_names)), None):
            reason = f"is a Hugging Face name; that tensor is, or is part of, {found.megatron} here"
        else:
            near = nearest(pattern, names)
            reason = f"matches no parameter{f'; nearest: {near}' if near else ''}"
        raise CordError(f"optimizer.groups.{group}: {pattern!r} {reason} (cord config parameters FILE lists the names)")


def settings_of(
    config: OptimizerConfig, factors: Mapping[str, float], model: LALM
) -> dict[torch.nn.Parameter, GroupSettings]:
    """Return the settings of this rank's trained parameters; `factors` are the groups' rates (`RateSchedule`)."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(config, rename_to_global(model, name)) or ""
            own = config.groups[group].weight_decay if group else None
            decay = config.weight_decay if own is None else own
            decays = parameter.dim() > 1 and not name.endswith(".bias")
            found[parameter] = GroupSettings(factors.get(group, 1.0), decay if decays else 0.0)
    return found


def megatron_overrides(
    settings: Mapping[torch.nn.Parameter, GroupSettings],
) -> dict[ParamKey, dict[str, float]]:
    """Return the settings as Megatron takes them: a key for those that are alike, which matches by the parameter.

    Megatron tells saved groups apart by `lr_mult` and `wd_mult`, which therefore hold the numbers themselves; the
    weight decay that `wd_mult` multiplies is 1.
    """

    def key(wanted: GroupSettings) -> ParamKey:
        name = f"{wanted.lr_mult}, {wanted.weight_decay}"
        predicate = ParamWithNamePredicate(name, lambda parameter, _: settings.get(parameter) == wanted)
        return ParamKey(with_name_predicate=predicate)

    return {
        key(wanted): {"lr_mult": wanted.lr_mult, "wd_mult": wanted.weight_decay}
        for wanted in dict.fromkeys(settings.values())
    }
