"""What `RolloutEngine.update_weights` takes: the trainer's sharded model, or tensors that every rank has whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert import export_tensors
from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.convert.names import global_parameters, hf_shapes, tensor_map_of
from megatron_cord.convert.peft.stream import adapter_shapes, export_adapters
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import TensorSpec


class ShardedModelWeights:
    """A `WeightSource` of a model that is sharded over the trainer's ranks, read when it is consumed, not before.

    Weights with LoRA are merged with it, or left out, and A and B yielded in their place.

    Args:
        model: this rank's part.
        changed: frozen parts of it that an engine does not have from the checkpoint it started with.
        lora: False for the weights without it.
    """

    def __init__(self, model: LALM, changed: Collection[str] = (), *, lora: bool = True) -> None:
        self._model, self._parts, self._lora = model, changed, lora
        modules = [getattr(model, part) for part in changed]
        self._changed = {id(p) for module in modules if module is not None for p in module.parameters()}
        self._adapted = set() if model.lora is None else {id(weight) for weight in model.lora.weights()}

    @property
    def in_main_replica(self) -> bool:
        """Whether this rank's shards belong to the replica of rank 0, or its experts to those that complete it."""
        layout = self._model.layout
        replica = layout.config.tp * layout.config.cp
        return layout.dp_rank * replica < max(replica, layout.config.ep)

    @property
    def lora_scale(self) -> float | None:
        """What multiplies B A of the model's LoRA."""
        return None if self._model.lora is None else self._model.lora.config.scale if self._lora else 0.0

    def without_lora(self) -> ShardedModelWeights:
        """Return the same weights without LoRA."""
        return ShardedModelWeights(self._model, self._parts, lora=False)

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        """Return names, shapes and dtypes without gathering a tensor. Collective over the main replica."""
        mine: dict[str, list[object]] = {}
        parameters, select = global_parameters(self._model), self._selection(full, merged)
        rules = tensor_map_of(self._model).rules
        for rule in rules:
            parameter = parameters.get(rule.megatron)
            if parameter is not None and (select is None or select(parameter)):
                shapes = hf_shapes(parameter, rule, self._model.layout)
                mine |= {name: [_plain(parameter.dtype), list(shape)] for name, shape in shapes.items()}
        added: list[str] = []
        if not merged and self._model.lora is not None:
            shapes_and_dtypes = adapter_shapes(self._model)
            mine |= {name: [_plain(dtype), list(shape)] for name, (shape, dtype) in shapes_and_dtypes.items()}
            added = [name for target in self._model.lora.targets for name in target.names()]
        found: dict[str, TensorSpec] = {}
        if self._model.layout.config.ep > 1:
            mine = {
                name: spec
                for share in all_gather_json(mine, self._model.layout.ep_group)
                for name, spec in share.items()
            }
        for share in all_gather_json(mine, self._model.layout.pp_group):
            found |= {
                name: TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, (dtype, shape) in share.items()
            }
        names = chain((name for rule in rules for name in rule.hf_names), added)
        return [found[name] for name in names if name in found]

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Gather full tensors one by one over the replica's ranks."""
        whole = export_tensors(self._model, self._selection(full, merged), in_pieces=in_pieces, lora=self._lora)
        return whole if merged or self._model.lora is None else chain(whole, export_adapters(self._model))

    def _selection(self, full: bool, merged: bool) -> Callable[[torch.nn.Parameter], bool] | None:
        if full:
            return None
        chosen = self._changed | (self._adapted if merged else set())
        return lambda parameter: parameter.requires_grad or id(parameter) in chosen


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PlainWeights:
    """A `WeightSource` of tensors that every rank has whole: for tests, checks and small models.

    Args:
        tensors: by published name; they must stay unchanged as long as an engine may need them again.
        checkpoint_dir: the checkpoint that servers were started with, which completes a full set.
    """

    def __init__(self, tensors: Mapping[str, Tensor], checkpoint_dir: str | Path | None = None) -> None:
        self._given, self._checkpoint_dir = dict(tensors), checkpoint_dir

    @property
    def in_main_replica(self) -> bool:
        """Whether this is rank 0: each rank is a replica of its own."""
        return not dist.is_initialized() or dist.get_rank() == 0

    @property
    def lora_scale(self) -> None:
        """None: there is no LoRA."""
        return

    def without_lora(self) -> PlainWeights:
        """Return the same."""
        return self

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        """Return the given tensors' specs, then those of the checkpoint's others."""
        given = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._given.items()]
        return given + [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self._others(full).items()]

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `specs`."""
        yield from self._given.items()
        for name, stored in self._others(full).items():
            yield name, stored.read()

    def _others(self, full: bool) -> dict[str, StoredTensor]:
        if not full or self._checkpoint_dir is None:
            return {}
        stored = published_tensors(self._checkpoint_dir, load_architecture(self._checkpoint_dir))
        return {name: tensor for name, tensor in stored if name not in self._given}
