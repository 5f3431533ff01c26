"""What `RolloutEngine.update_weights` takes: the trainer's sharded model, or tensors that every rank has whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert import export_tensors
from megatron_cord.convert.hf_reader import StoredTensor
from megatron_cord.convert.names import global_parameters, hf_shapes, tensor_map_of
from megatron_cord.convert.spelling import published_tensors
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import TensorSpec


class ShardedModelWeights:
    """A `WeightSource` of a model that is sharded over the trainer's ranks, read when it is consumed, not before.

    Args:
        model: this rank's part.
        changed: frozen parts of it that an engine does not have from the checkpoint it started with.
    """

    def __init__(self, model: LALM, changed: Collection[str] = ()) -> None:
        self._model = model
        modules = [getattr(model, part) for part in changed]
        self._changed = {id(p) for module in modules if module is not None for p in module.parameters()}

    @property
    def in_main_replica(self) -> bool:
        """Whether this rank's shards belong to the replica of rank 0."""
        return dist.get_rank(self._model.layout.dp_group) == 0

    def specs(self, *, full: bool) -> list[TensorSpec]:
        """Return names, shapes and dtypes without gathering a tensor. Collective over the replica's pipeline stages."""
        mine: dict[str, list[object]] = {}
        parameters, select = global_parameters(self._model), self._selection(full)
        rules = tensor_map_of(self._model).rules
        for rule in rules:
            parameter = parameters.get(rule.megatron)
            if parameter is not None and (select is None or select(parameter)):
                dtype = str(parameter.dtype).removeprefix("torch.")
                shapes = hf_shapes(parameter, rule, self._model.layout)
                mine |= {name: [dtype, list(shape)] for name, shape in shapes.items()}
        found: dict[str, TensorSpec] = {}
        for share in all_gather_json(mine, self._model.layout.pp_group):
            found |= {
                name: TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, (dtype, shape) in share.items()
            }
        return [found[name] for rule in rules for name in rule.hf_names if name in found]

    def tensors(self, *, full: bool, in_pieces: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Gather full tensors one by one over the replica's ranks."""
        return export_tensors(self._model, self._selection(full), in_pieces=in_pieces)

    def _selection(self, full: bool) -> Callable[[torch.nn.Parameter], bool] | None:
        return None if full else lambda parameter: parameter.requires_grad or id(parameter) in self._changed


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

    def specs(self, *, full: bool) -> list[TensorSpec]:
        """Return the given tensors' specs, then those of the checkpoint's others."""
        given = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._given.items()]
        return given + [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self._others(full).items()]

    def tensors(self, *, full: bool, in_pieces: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `specs`."""
        yield from self._given.items()
        for name, stored in self._others(full).items():
            yield name, stored.read()

    def _others(self, full: bool) -> dict[str, StoredTensor]:
        if not full or self._checkpoint_dir is None:
            return {}
        stored = published_tensors(self._checkpoint_dir, load_architecture(self._checkpoint_dir))
        return {name: tensor for name, tensor in stored if name not in self._given}
