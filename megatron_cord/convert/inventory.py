"""Every tensor of a model: names, shapes and layouts on both sides, without weights or memory for them.

The model is built from fake tensors, which have shapes only, so that the inventory is that of the model which is
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cord.convert.hf.reader import StoredTensor
from megatron_cord.convert.names import global_parameters, hf_shapes, tensor_map_of
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import all_gather_json


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor and its place in the Megatron model.

    Attributes:
        name: as published.
        shape: sizes.
        megatron: the tensor that holds it, layers numbered over all pipeline stages.
        layout: how it lies in that tensor.
    """

    name: str
    shape: tuple[int, ...]
    megatron: str
    layout: str

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


class _FakeModel(LALM):
    """A model that is never moved to a device: fake tensors cannot be."""

    def to(self, *_: Any, **__: Any) -> Self:
        return self


def fake_model(arch: Architecture, layout: Layout, dtype: torch.dtype = torch.bfloat16) -> LALM:
    """Build this rank's part of the model from torch's fake tensors: with a shape and a precision but no memory.

    Raises:
        CordError: the layout does not divide the model.
    """
    with FakeTensorMode():
        return _FakeModel(arch, layout, dtype, LayerConfig("torch"))


def inventory(model: LALM) -> list[Entry]:
    """Return all tensors of the model over all stages, in the order of export. Collective over all ranks."""
    parameters, table = global_parameters(model), tensor_map_of(model)
    mine: dict[str, list[int]] = {}
    for rule in table.rules:
        if rule.megatron in parameters:
            mine |= {
                name: list(shape) for name, shape in hf_shapes(parameters[rule.megatron], rule, model.layout).items()
            }
    shapes: dict[str, list[int]] = {}
    for share in all_gather_json(mine):
        shapes |= share
    return [
        Entry(name, tuple(shapes[name]), rule.megatron, type(rule.layout).__name__)
        for rule in table.rules
        for name in rule.hf_names
    ]


def common_dtype(tensors: Sequence[StoredTensor]) -> torch.dtype:
    """Return the precision that all tensors have.

    Raises:
        CordError: they have several.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        several = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CordError(f"{tensors[0].path.parent} mixes tensors of {several}; choose one with --dtype")
    return dtypes.pop()
