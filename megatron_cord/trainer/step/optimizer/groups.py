"""Which parameters have a learning rate or a weight decay of their own: `optimizer.groups` by name.

A parameter's name is the one in the whole model, layers numbered over all pipeline stages, so that a pattern means the
same on every layout. A pattern that matches no parameter that is trained is an error, found from the architecture
alone before anything is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_cord.convert.names import rename_to_global
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import PARTS
from megatron_cord.model.families import family_of
from megatron_cord.model.lalm import LALM
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
    return next((group for group, given in config.groups.items() if _matches(given.match or group, name)), None)


def check_groups(config: OptimizerConfig, arch: Architecture, freeze: Collection[str]) -> None:
    """Refuse a group that no parameter is in.

    Args:
        config: with the groups.
        arch: of the model.
        freeze: parts that are not trained.

    Raises:
        CordError: it names what the pattern may have meant.
    """
    if not config.groups:
        return
    parts = [part for part in PARTS if part not in freeze]
    rules = family_of(arch).tensor_map(arch).rules
    names = [rule.megatron for rule in rules]
    trained = [name for name in names if name.partition(".")[0] in parts]
    members = {group_of(config, name) for name in trained}
    for group, given in config.groups.items():
        if group in members:
            continue
        pattern = given.match or group
        if matching := [name for name in trained if _matches(pattern, name)]:
            taken = group_of(config, matching[0])
            reason = f"matches only parameters that the group {taken} before it takes"
        elif matching := [name for name in names if _matches(pattern, name)]:
            reason = f"matches only parameters that model.freeze leaves untrained, such as {matching[0]}"
        elif found := next((rule for rule in rules if any(_matches(pattern, n) for n in rule.hf_names)), None):
            reason = f"is a Hugging Face name; that tensor is, or is part of, {found.megatron} here"
        else:
            near = _nearest(pattern, names)
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


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _nearest(pattern: str, names: Collection[str]) -> str | None:
    """Return the name with a run of words that contains, or is most like, the pattern without its stars."""
    wanted = pattern.strip("*.")
    runs: dict[str, str] = {}
    for name in names:
        words = name.split(".")
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                runs.setdefault(".".join(words[start:end]), name)
    containing = min((run for run in runs if wanted in run), key=len, default=None)
    found = [containing] if containing else difflib.get_close_matches(wanted, runs, n=1)
    return runs[found[0]] if found else None
