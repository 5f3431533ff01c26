"""LoRA beside one linear layer: y = x Wᵀ + scale · dropout(x) Aᵀ Bᵀ, on whatever class the layer is of.

The branch is added by a hook, so that the layer, its names and its checkpoints stay as they are. Of a fused matrix each
part has its own A and B, and all parts one mask of the dropout. Communication is of rank r instead of the layer's
width:

    layer            A                   B                     between them
    column-parallel  [r, in], whole      [out / TP, r]         whole; sequence-parallel: tokens gathered
    row-parallel     [r, in / TP]        [out, r], whole       summed; sequence-parallel: summed and scattered
    neither          [r, in], whole      [out, r], whole       nothing

An expert's matrices are of the last kind, whole on the ranks that have the expert, and so are their A and B.

Legend: S tokens of the layer's input, s of them on this rank (s = S / TP for the whole matrices under sequence
parallelism), B sequences, P parts, r rank, TP ranks.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.model.config import LoraConfig
from megatron_cord.model.lora.factors import Factors, draw_a
from megatron_cord.model.lora.fused_norm import FusedNorm
from megatron_cord.model.lora.marks import mark_expert, mark_shards
from megatron_cord.model.lora.targets import LoraTarget
from megatron_cord.parallel.layout import Layout


class LoraBranch(torch.nn.Module):
    """The LoRA of one linear layer; its parameters are `LABEL.lora_A` and `LABEL.lora_B` for each part.

    Args:
        base: the layer, Megatron's, transformer-engine's or torch's, with a weight [out, in] or this rank's shard.
        target: which matrix it is.
        config: of LoRA.
        tower: the configuration of the part of the model that it is in.
        layout: this rank's place.
        seed: from which A is drawn, by its name; B is zero.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        target: LoraTarget,
        config: LoraConfig,
        tower: TransformerConfig,
        layout: Layout,
        seed: int,
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.target, self.scale, self.dropout = target, config.scale, config.dropout
        self._weight = (weight,)  # in a tuple, so that it is no parameter of this module
        self.shard_dim, self._tp_group = target.layout.shard_dim, layout.tp_group
        self._sequence_parallel = bool(tower.sequence_parallel) and self.shard_dim is not None
        self._norm = FusedNorm(base, tower) if hasattr(base, "layer_norm_weight") else None
        tp = layout.config.tp
        rows, columns = weight.shape
        self._runs = target.layout.runs(tp)
        whole = torch.empty(rows * (tp if self.shard_dim == 0 else 1), 1, device="meta")
        self._rows = [len(part) * rows // len(whole) for part in target.layout.split(whole, tp)]
        for label, part_rows in zip(target.labels, self._rows, strict=True):
            if label is not None:
                a = draw_a(config.rank, columns * (tp if self.shard_dim == 1 else 1), f"{target.module}.{label}", seed)
                if self.shard_dim == 1:
                    a = a.chunk(tp, dim=1)[layout.tp_group.rank()]
                factors = Factors(
                    a.to(weight.device, weight.dtype),
                    torch.zeros(part_rows, config.rank, dtype=weight.dtype, device=weight.device),
                )
                if target.is_expert:
                    mark_expert(factors, weight)
                elif self.shard_dim is not None:
                    mark_shards(factors, self.shard_dim, self._sequence_parallel)
                self.add_module(label, factors)
        base.register_forward_hook(self._add)
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        return self._weight[0]

    @property
    def factors(self) -> dict[str, Factors]:
        """A and B of each part, by label."""
        return dict(self.named_children())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output.

        Args:
            x: [s, B, in], or [s, B, in / TP] of a row-parallel layer.

        Returns:
            [S, B, out / TP] of a column-parallel layer, else [s, B, out].
        """
        if self._norm is not None:
            x = self._norm(x)
        if self.dropout and self.training:
            # Ranks with the same input need the same mask, and others different ones.
            own = self.shard_dim == 1 or self._sequence_parallel or self.target.is_expert
            with get_cuda_rng_tracker().fork() if own else contextlib.nullcontext():
                x = torch.nn.functional.dropout(x, self.dropout)
        factors = self.factors
        h = torch.nn.functional.linear(x, torch.cat([each.lora_A for each in factors.values()]))
        hidden = iter(self._between(h).chunk(len(factors), dim=-1))
        parts = [
            None if label is None else torch.nn.functional.linear(next(hidden), factors[label].lora_B)
            for label in self.target.labels
        ]
        return self._fused(parts) * self.scale

    def weight_delta(self) -> Tensor:
        """Return scale · B A in the layout of the layer's weight, float32 [out, in], this rank's shard."""
        factors = self.factors
        parts = [
            None if label is None else (factors[label].lora_B.float() @ factors[label].lora_A.float()).t()
            for label in self.target.labels
        ]
        return self._fused(parts).t() * self.scale

    def _between(self, h: Tensor) -> Tensor:
        """Communicate [s, B, P r] between A and B."""
        if self.shard_dim is None:
            return h
        if self.shard_dim == 0:
            if self._sequence_parallel:
                return gather_from_sequence_parallel_region(h, group=self._tp_group)  # type: ignore[no-any-return]
            return copy_to_tensor_model_parallel_region(h, group=self._tp_group)  # type: ignore[no-any-return]
        if self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(h, group=self._tp_group)  # type: ignore[no-any-return]
        return reduce_from_tensor_model_parallel_region(h, group=self._tp_group)  # type: ignore[no-any-return]

    def _fused(self, parts: list[Tensor | None]) -> Tensor:
        """Join the parts' [..., rows of a part] to [..., rows of the layer's weight]; zeros for parts without LoRA."""
        if len(parts) == 1 and parts[0] is not None:
            return parts[0]
        present = next(part for part in parts if part is not None)
        shapes = [(*present.shape[:-1], self._runs, rows // self._runs) for rows in self._rows]
        runs = [
            present.new_zeros(shape) if part is None else part.reshape(shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        return torch.cat(runs, dim=-1).flatten(-2)

    def _add(self, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Add the branch to the layer's output, which Megatron's layers return beside their bias."""
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return (output[0] + self(inputs[0]), *output[1:])
        return output + self(inputs[0])
