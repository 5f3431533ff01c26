"""Where the weights of an exchange come from: the trainer's sharded model, first on paper, then as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert.checkpoint_files import StoredTensor, stored_tensors
from megatron_cord.convert.stream import export_tensors, global_parameters, hf_shapes, tensor_map_of
from megatron_cord.model.families import family_of, load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.sglang.weight_sync.bucket import TensorSpec


@runtime_checkable
class WeightSource(Protocol):
    """Tensors under their Hugging Face names; all of them, or those that training changes."""

    @property
    def participates(self) -> bool:
        """Whether this rank must call `specs` and `tensors` when rank 0 does."""
        ...

    def specs(self, full: bool) -> list[TensorSpec]:
        """What `tensors` will yield, in its order."""
        ...

    def tensors(self, full: bool) -> Iterator[tuple[str, Tensor]]:
        """Every participating rank consumes the whole iterator; rank 0 uses what it yields.

        A tensor may have a dimension more than planned, [pieces, rows of a piece, ...], its rows being those of all pieces.
        """
        ...


class ModelWeights:
    """The weights of a model that is sharded over ranks. Iterating gives the trained ones, as every rollout engine takes them.

    Args:
        model: this rank's part. Only the ranks that share a replica with rank 0 participate.
    """

    def __init__(self, model: LALM) -> None:
        self._model = model

    @property
    def participates(self) -> bool:
        """Whether this rank's shards are in rank 0's replica."""
        return dist.get_rank(self._model.layout.dp_group) == 0

    def specs(self, full: bool) -> list[TensorSpec]:
        """Names, shapes and dtypes without gathering a tensor. Collective over the replica's pipeline stages."""
        mine: dict[str, list[object]] = {}
        parameters, select = global_parameters(self._model), _selection(full)
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

    def tensors(self, full: bool) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, gathered one by one over the replica's ranks."""
        return export_tensors(self._model, _selection(full), in_pieces=True)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return export_tensors(self._model, _selection(full=False))


class GivenWeights:
    """Tensors that the ranks have whole, kept in rank 0's memory: for small models and tests. What a full exchange needs beyond them is the
    checkpoint's.

    Args:
        tensors: under their Hugging Face names; every rank consumes them.
        checkpoint_dir: that the servers were started with.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], checkpoint_dir: str | Path) -> None:
        self._given: dict[str, Tensor] = {}
        self._checkpoint_dir = checkpoint_dir
        for name, tensor in tensors:
            if self.participates:
                self._given[name] = tensor.detach().clone()

    @property
    def participates(self) -> bool:
        """Only rank 0 has them."""
        return dist.get_rank() == 0

    def specs(self, full: bool) -> list[TensorSpec]:
        """The given ones, then the checkpoint's others."""
        given = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._given.items()]
        return given + [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self._others(full).items()]

    def tensors(self, full: bool) -> Iterator[tuple[str, Tensor]]:
        """As `specs` says."""
        yield from self._given.items()
        for name, stored in self._others(full).items():
            yield name, stored.read()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors(full=False)

    def _others(self, full: bool) -> dict[str, StoredTensor]:
        if not full:
            return {}
        canonical = family_of(load_architecture(self._checkpoint_dir)).canonical_name
        stored = {canonical(t.name): t for t in stored_tensors(self._checkpoint_dir)}
        return {name: t for name, t in stored.items() if name not in self._given}


def _selection(full: bool) -> Callable[[torch.nn.Parameter], bool] | None:
    return None if full else lambda parameter: parameter.requires_grad
