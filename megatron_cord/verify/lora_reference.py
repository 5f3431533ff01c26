"""LoRA of the reference of ``verify layout``: W + scale · B A formed as one matrix, in float64.

transformers keeps all experts of a layer in two tensors; there the sum is formed for each expert's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from megatron_cord.convert.plain.fused_experts import published_parts


class LoraReference:
    """A and B of a model's linear layers and experts, which compute with them from now on.

    Args:
        model: the reference, of transformers.
        names: of A and B, in pairs, by the published name of a module: MODULE.lora_A.weight.
        rank: of A and B.
        scale: of their product.
        seed: of their values; none is zero.

    Attributes:
        factors: A [rank, in] and B [out, rank] by name.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str], rank: int, scale: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.factors: dict[str, Tensor] = {}
        self._scale, self._enabled = scale, True
        self._parts: dict[str, Callable[[], Tensor]] = {}  # a matrix, by published name, as the model has it now
        self._modules = [name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")]
        adapted = {f"{module}.weight" for module in self._modules}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                published = published_name(f"{name}.weight")
                self._parts[published] = partial(getattr, module, "weight")
                if published in adapted:
                    module.forward = partial(self._linear, module, published)  # type: ignore[method-assign]
            elif isinstance(module, Qwen3MoeExperts):
                for kind in ("gate_up_proj", "down_proj"):
                    for number, (part, _) in enumerate(_parts_of(module, name, kind)):
                        self._parts[part] = partial(_part, module, name, kind, number)
                module.forward = partial(self._experts, module, name, module.forward)
        for name in names:
            module_name, _, factor = name.removesuffix(".weight").rpartition(".")
            rows, columns = self._parts[f"{module_name}.weight"]().shape
            size = (rank, columns) if factor == "lora_A" else (rows, rank)
            drawn = torch.randn(size, generator=generator) * size[1] ** -0.5
            if factor == "lora_B":
                drawn *= 0.5 / scale  # so that W still has a part in the sum
            self.factors[name] = drawn.double().requires_grad_(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute without LoRA."""
        self._enabled = False
        yield
        self._enabled = True

    def merged(self) -> dict[str, Tensor]:
        """Return the weights beside which there is LoRA, by published name."""
        return {f"{module}.weight": self._sum(f"{module}.weight") for module in self._modules}

    def _sum(self, name: str) -> Tensor:
        """Return a matrix as it is used, by its published name."""
        module, weight = name.removesuffix(".weight"), self._parts[name]()
        a, b = (self.factors.get(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
        return weight if a is None or b is None or not self._enabled else weight + self._scale * b @ a

    def _linear(self, layer: torch.nn.Linear, name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._sum(name), layer.bias)

    def _experts(self, module: torch.nn.Module, name: str, forward: Callable[..., Tensor], *given: Any) -> Tensor:
        """Compute all experts of a layer with other matrices in the place of theirs."""
        used = {}
        for kind, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            sums = [self._sum(part) for part, _ in _parts_of(module, name, kind)]
            used[kind] = torch.stack([torch.cat(sums[i : i + parts]) for i in range(0, len(sums), parts)])
        kept = {kind: module._parameters.pop(kind) for kind in used}
        try:
            for kind, whole in used.items():
                setattr(module, kind, whole)
            return forward(*given)
        finally:
            for kind, parameter in kept.items():
                delattr(module, kind)
                module.register_parameter(kind, parameter)


def _parts_of(module: torch.nn.Module, name: str, kind: str) -> list[tuple[str, Tensor]]:
    """Return each expert's matrices in one of the two tensors, by published name."""
    return [(published_name(part), view) for part, view in published_parts(f"{name}.{kind}", getattr(module, kind))]


def _part(module: torch.nn.Module, name: str, kind: str, number: int) -> Tensor:
    return _parts_of(module, name, kind)[number][1]


def published_name(name: str) -> str:
    """Return the name in published checkpoints of a tensor of transformers' model, which renames some."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name
