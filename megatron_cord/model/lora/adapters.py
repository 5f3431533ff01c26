"""All LoRA branches of one rank's part of a model: on and off, dropout, merged weights, and what checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.lora.branch import LoraBranch
from megatron_cord.model.lora.targets import LoraTarget
from megatron_cord.model.tensor_map import EXPERTS
from megatron_cord.parallel.layout import Layout
from megatron_cord.runtime.files import fingerprint


class LoraAdapters(torch.nn.Module):
    """The branches beside the layers of a model, which stay as they are.

    Args:
        modules: this rank's modules, by their names in the whole model.
        towers: the configuration of each part of the model that has one; that of the whole model for the others.
        targets: the matrices of all pipeline stages that get LoRA.
        config: of LoRA.
        layout: this rank's place.
        seed: of A and of the dropout.

    Attributes:
        targets: of all stages.
        branches: of this rank, by the module's name in the whole model.

    Raises:
        CordError: experts of a class that does not hold each one's matrices by themselves.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        towers: Mapping[str, TransformerConfig],
        targets: Sequence[LoraTarget],
        config: LoraConfig,
        layout: Layout,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.targets = config, tuple(targets)
        self._layout, self._seed = layout, seed
        self.branches: dict[str, LoraBranch] = {}
        for target in targets:
            if target.is_expert:
                _check_experts(modules, target.module.partition(EXPERTS)[0] + EXPERTS.rstrip("."))
            if target.module in modules:
                tower = towers[target.module.partition(".")[0]]
                branch = LoraBranch(modules[target.module], target, config, tower, layout, seed)
                self.branches[target.module] = branch
                self.add_module(target.module.replace(".", "/"), branch)  # a module's name has no dots

    def has(self, part: str) -> bool:
        """Return whether a part of the model has LoRA, on whatever stage."""
        return any(target.module.partition(".")[0] == part for target in self.targets)

    def factors(self) -> dict[str, tuple[torch.nn.Parameter, int | None]]:
        """Return this rank's A and B by their names in the whole model, each with the dimension split over TP ranks."""
        found: dict[str, tuple[torch.nn.Parameter, int | None]] = {}
        for module, branch in self.branches.items():
            for label, factors in branch.factors.items():
                found[f"{module}.{label}.lora_A"] = factors.lora_A, 1 if branch.shard_dim == 1 else None
                found[f"{module}.{label}.lora_B"] = factors.lora_B, 0 if branch.shard_dim == 0 else None
        return found

    def weights(self) -> list[Tensor]:
        """Return this rank's weights beside which there is LoRA."""
        return [branch.weight for branch in self.branches.values()]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the weights beside the adapters alone, bit for bit, as a frozen teacher does."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for branch in self.branches.values():
            branch.enabled = enabled

    def reseed(self, step: int, update: int) -> None:
        """Let the dropout of an update depend on its number and on the ranks that share its tokens alone.

        So a resumed run draws the same masks on the same layout.
        """
        if self.config.dropout:
            place = self._layout.groups.dp_cp.rank()
            number = int(fingerprint([self._seed, step, update, place])[:7], 16)
            torch.manual_seed(number)
            model_parallel_cuda_manual_seed(number)

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return W + scale · B A in the weight's precision; the weight itself where it has no LoRA.

        Args:
            name: of the parameter in the whole model.
            weight: this rank's shard.
        """
        module, _, kind = name.rpartition(".")
        branch = self.branches.get(module) if kind == "weight" else None
        return weight if branch is None else (weight.float() + branch.weight_delta()).to(weight.dtype)

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """Describe A and B for dist_checkpointing: their keys are their names in the whole model."""
        groups: dict[str, Any] = {"tp_group": self._layout.tp_group, "dp_cp_group": self._layout.groups.dp_cp}
        experts = {"replica_id": (0, 0, self._layout.groups.expt_dp.rank())}
        state = {}
        for name, (parameter, dim) in self.factors().items():
            module, label, factor = name.rsplit(".", 2)
            key = f"{prefix}{module.replace('.', '/')}.{label}.{factor}"
            state[key] = (
                make_sharded_tensor_for_checkpoint(parameter, name, **groups, **(experts if EXPERTS in name else {}))
                if dim is None
                else make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=dim, **groups)
            )
        return state


def _check_experts(modules: Mapping[str, torch.nn.Module], name: str) -> None:
    """Refuse experts, if they are here, of another class than Megatron's SequentialMLP."""
    experts = modules.get(name)
    if experts is not None and not hasattr(experts, "local_experts"):
        raise CordError(
            f"model.lora: {name} is a {type(experts).__name__}, which holds the matrices of all experts in one; "
            "LoRA needs a SequentialMLP, or model.lora.targets without experts"
        )
