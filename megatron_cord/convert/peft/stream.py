"""A model's LoRA as a stream of full tensors, `MODULE.lora_A.weight` and `MODULE.lora_B.weight`, in both directions.

MODULE is the published name of a Hugging Face module, so that these are the tensors of PEFT up to a prefix.
Legend: r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_cord.convert.audit import check_problems
from megatron_cord.convert.names import global_parameters, hf_shapes, tensor_map_of
from megatron_cord.convert.stream import broadcast_from_owner, fill_shard, gather
from megatron_cord.model.lalm import LALM
from megatron_cord.model.patterns import nearest


@torch.no_grad()
def export_adapters(model: LALM) -> Iterator[tuple[str, Tensor]]:
    """Yield A [r, in] and B [out, r] of every matrix with LoRA, in the order of the family's table.

    Collective over the model's tensor, expert and pipeline groups, whose ranks each get every tensor.
    """
    assert model.lora is not None
    factors = model.lora.factors()
    for target in model.lora.targets:
        for published, name in target.names().items():
            parameter, dim = factors.get(name, (None, None))
            shard = None if parameter is None else gather(parameter.detach(), dim, model.layout)
            full = broadcast_from_owner(shard, model.layout, target.is_expert)
            assert full is not None
            yield published, full


def adapter_shapes(model: LALM) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and precision of the full A and B of this stage, by published name."""
    assert model.lora is not None
    factors, tp = model.lora.factors(), model.layout.config.tp
    found = {}
    for target in model.lora.targets:
        for published, name in target.names().items():
            if name in factors:
                parameter, dim = factors[name]
                shape = tuple(size * (tp if axis == dim else 1) for axis, size in enumerate(parameter.shape))
                found[published] = shape, parameter.dtype
    return found


@torch.no_grad()
def import_adapters(model: LALM, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill this rank's A and B, and the parts that are trained whole, from full tensors. Not collective.

    Args:
        model: any rank's part, with LoRA.
        tensors: A and B of all matrices, and the tensors of those parts, by published name.
        source: what they come from, for messages.

    Raises:
        CordError: missing, unexpected or misshapen tensors, all listed at once; nothing is filled then.
    """
    assert model.lora is not None
    layout, factors, parameters = model.layout, model.lora.factors(), global_parameters(model)
    names = {published: name for target in model.lora.targets for published, name in target.names().items()}
    parts = model.lora.config.whole
    rules = [rule for rule in tensor_map_of(model).rules if rule.megatron.partition(".")[0] in parts]
    expected = [*names, *(name for rule in rules for name in rule.hf_names)]
    problems = [f"{source} lacks {name}" for name in expected if name not in tensors]
    for name in tensors.keys() - set(expected):
        near = nearest(name, expected)
        problems.append(
            f"{source} has {name}, which model.lora does not train" + (f" (nearest: {near})" if near else "")
        )
    shapes = {published: list(shape) for published, (shape, _) in adapter_shapes(model).items()}
    for rule in rules:
        if rule.megatron in parameters:
            shapes |= {n: list(shape) for n, shape in hf_shapes(parameters[rule.megatron], rule, layout).items()}
    for name, shape in shapes.items():
        if name in tensors and list(tensors[name].shape) != shape:
            problems.append(f"{source}: {name} has shape {list(tensors[name].shape)}, expected {shape}")
    check_problems(problems)
    for published, name in names.items():
        if name in factors:
            parameter, dim = factors[name]
            full = tensors[published]
            parameter.copy_(full if dim is None else full.chunk(layout.config.tp, dim=dim)[layout.tp_group.rank()])
    for rule in rules:
        if rule.megatron in parameters:
            fill_shard(parameters[rule.megatron], rule, {name: tensors[name] for name in rule.hf_names}, layout)
