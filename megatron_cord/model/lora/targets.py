"""Which matrices of a model get LoRA, found from its architecture alone, so that they are the same on every layout.

Megatron fuses matrices that Hugging Face has apart (query, key and value; gate and up). Each part has matrices A and B
of its own here, as in PEFT: adapters are then the same tensors in both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import PARTS, LoraConfig
from megatron_cord.model.families import family_of
from megatron_cord.model.patterns import matches, nearest
from megatron_cord.model.tensor_layouts import Column, GateUp, Qkv, Row, TensorLayout
from megatron_cord.model.tensor_map import EXPERTS

_WEIGHT = ".weight"


@dataclass(frozen=True)
class LoraTarget:
    """One matrix of the Megatron model.

    Attributes:
        module: the module that holds it, in the whole model.
        parts: the published names of the Hugging Face modules that it is made of, in the layout's order; None for a
            part without LoRA.
        layout: how the parts are joined and split.
    """

    module: str
    parts: tuple[str | None, ...]
    layout: TensorLayout

    @property
    def is_expert(self) -> bool:
        """Whether it is one expert's, which expert-parallel ranks share out."""
        return EXPERTS in self.module

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The last word of each part's name, such as q_proj, which is unique in the matrix."""
        return tuple(None if part is None else part.rpartition(".")[2] for part in self.parts)

    def names(self) -> dict[str, str]:
        """Return the name in the whole model of each matrix A and B, by its name in PEFT without prefixes."""
        return {
            f"{part}.{factor}.weight": f"{self.module}.{label}.{factor}"
            for part, label in zip(self.parts, self.labels, strict=True)
            for factor in ("lora_A", "lora_B")
            if part is not None
        }


def linear_modules(arch: Architecture) -> list[LoraTarget]:
    """Return all matrices that can have LoRA: those of layers, experts', and the adapter's.

    No convolution, embedding or router.
    """
    return [
        LoraTarget(
            rule.megatron.removesuffix(_WEIGHT),
            tuple(None if name is None else name.removesuffix(_WEIGHT) for name in rule.hf),
            rule.layout,
        )
        for rule in family_of(arch).tensor_map(arch).rules
        if rule.megatron.endswith(_WEIGHT)
        and (
            rule.is_expert
            or isinstance(rule.layout, Column | Row | Qkv | GateUp)
            or rule.megatron.startswith("adapter.linear")
        )
    ]


def find_targets(arch: Architecture, config: LoraConfig, freeze: Collection[str]) -> list[LoraTarget]:
    """Return the matrices that get LoRA; those of parts that are frozen, or trained whole, never do.

    Args:
        arch: of the model.
        config: with the patterns.
        freeze: parts that are not trained.

    Raises:
        CordError: a pattern that matches none of them, with what it may have meant.
    """
    every = linear_modules(arch)
    closed = {part: "model.freeze" for part in freeze} | {part: "model.lora.whole" for part in config.whole}
    open_ = [target for target in every if target.module.partition(".")[0] not in closed]
    for pattern in config.targets:
        if any(_chosen(pattern, target) for target in open_):
            continue
        if held := next((target for target in every if _chosen(pattern, target)), None):
            part = held.module.partition(".")[0]
            reason = f"matches only matrices of {part}, which {closed[part]} names"
        else:
            near = nearest(pattern, [name for target in every for name in (target.module, *target.parts) if name])
            reason = f"matches no matrix that can have LoRA{f'; nearest: {near}' if near else ''}"
        raise CordError(f"model.lora.targets: {pattern!r} {reason} (cord config parameters FILE lists what is trained)")
    found = [_restricted(target, config.targets) for target in open_] if config.targets else open_
    chosen = [target for target in found if any(target.parts)]
    if not chosen:
        parts = ", ".join(part for part in PARTS if part in closed)
        raise CordError(f"model.lora: no matrix is left for it, as model.freeze and model.lora.whole name {parts}")
    return chosen


def _chosen(pattern: str, target: LoraTarget) -> bool:
    """Return whether a pattern matches the matrix or a part of it."""
    return any(_named(pattern, name) for name in (target.module, *target.parts) if name is not None)


def _named(pattern: str, name: str) -> bool:
    return matches(pattern, name) or name.endswith(f".{pattern}")


def _restricted(target: LoraTarget, patterns: Sequence[str]) -> LoraTarget:
    """Return the target with those parts alone that a pattern matches, by their own name or by the matrix's."""
    if any(_named(pattern, target.module) for pattern in patterns):
        return target
    parts = (
        part if part is not None and any(_named(pattern, part) for pattern in patterns) else None
        for part in target.parts
    )
    return replace(target, parts=tuple(parts))
