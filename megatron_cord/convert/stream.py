"""Tensors between Hugging Face's names and shapes and the sharded Megatron model, as a stream in both directions.

One Megatron tensor is converted at a time. Memory: at most the parts of one fused tensor beside the model, whatever the
size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert.audit import Audit, check_problems
from megatron_cord.convert.hf.spelling import as_published
from megatron_cord.convert.names import global_parameters, tensor_map_of
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorRule
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.transfers import to_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def export_tensors(
    model: LALM,
    select: Callable[[torch.nn.Parameter], bool] | None = None,
    *,
    in_pieces: bool = False,
    lora: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield full tensors under their published Hugging Face names, gathered over tensor ranks and pipeline stages.

    Weights that have LoRA are yielded merged with it: W + scale · B A. Of a mixture, one expert's matrix is sent at a
    time, by the rank that has it.

    Collective: every rank of the model's tensor, expert and pipeline groups must consume the whole iterator, and each
    gets every tensor.

    Args:
        model: any rank's part.
        select: which of this rank's parameters to export, e.g. those that are trained; all if None. Ranks that hold
            shards of one tensor must agree.
        in_pieces: spare a copy of what is part of a fused tensor and does not lie in one piece: it is yielded as a view
            with a dimension more, [pieces, rows of a piece, ...].
        lora: merge it; False yields the weights beside it as they are.

    Yields:
        (name, tensor) in the order of the family's table, on the model's device; the tensor may be a view of the
        parameter.
    """
    layout = model.layout
    parameters = global_parameters(model)
    for rule in tensor_map_of(model).rules:
        parameter = parameters.get(rule.megatron)
        if parameter is not None and select is not None and not select(parameter):
            parameter = None
        shard = None if parameter is None else parameter.detach()
        if shard is not None and model.lora is not None and lora:
            shard = model.lora.merged(rule.megatron, shard)
        full = None if shard is None else gather(shard, rule.layout.shard_dim, layout)
        full = broadcast_from_owner(full, layout, rule.is_expert)
        if full is not None:
            parts = (rule.layout.views if in_pieces else rule.layout.split)(full, layout.config.tp)
            for name, tensor in zip(rule.hf, parts, strict=True):
                if name is not None:
                    yield name, tensor if tensor.dim() > full.dim() else tensor.contiguous()


@torch.no_grad()
def import_tensors(model: LALM, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill this rank's part of the model from full tensors in any order. Not collective: each rank reads all of them.

    Args:
        model: any rank's part.
        tensors: (name, tensor) under Hugging Face names, in any transformers version's spelling.

    Raises:
        CordError: missing, unexpected, duplicated or misshapen tensors, all listed at once.
    """
    audit = Audit(model)
    incomplete: dict[str, dict[str, Tensor]] = {}
    for given, name, tensor in as_published(model.arch, tensors, lambda tensor: tensor, "the tensors"):
        rule = audit.admit(given, name, tensor.shape)
        if rule is None:
            continue
        parts = incomplete.setdefault(rule.megatron, {})
        parts[name] = tensor
        if len(parts) == len(rule.hf_names):
            fill_shard(audit.parameters[rule.megatron], rule, incomplete.pop(rule.megatron), model.layout)
    check_problems(audit.problems())


def gather(shard: Tensor, dim: int | None, layout: Layout) -> Tensor:
    """Return all tensor-parallel shards along a dimension in one tensor; None: every rank has all of it. Collective."""
    if dim is None or layout.config.tp == 1:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(layout.config.tp)]
    dist.all_gather(shards, shard.contiguous(), group=layout.tp_group)
    return torch.cat(shards, dim=dim)


def broadcast_from_owner(full: Tensor | None, layout: Layout, is_expert: bool) -> Tensor | None:
    """Return the tensor of the first stage, and of an expert the first rank, that holds it, on every one. Collective.

    None if none does.
    """
    if is_expert and layout.config.ep > 1:
        full = _from_owner(full, layout.ep_group, layout.device)
    return full if layout.config.pp == 1 else _from_owner(full, layout.pp_group, layout.device)


def _from_owner(full: Tensor | None, group: dist.ProcessGroup, device: torch.device) -> Tensor | None:
    """Return the tensor of the first rank of a group that has it, on all of them; None if none has. Collective."""
    own = [] if full is None else [1, _DTYPES.index(full.dtype), full.dim(), *full.shape]
    header = to_device(torch.tensor(own + [0] * (8 - len(own))), device)  # has it, dtype, dimensions, sizes
    headers = torch.empty(8 * group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(headers, header, group=group)
    rows = headers.view(-1, 8).tolist()  # the host waits once a tensor
    owners = [rank for rank, row in enumerate(rows) if row[0]]
    if not owners:
        return None
    _, dtype, dims, *sizes = rows[owners[0]]
    if full is None or group.rank() != owners[0]:
        full = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=device)
    full = full.contiguous()
    dist.broadcast(full, dist.get_global_rank(group, owners[0]), group=group)
    return full


def fill_shard(parameter: Tensor, rule: TensorRule, parts: dict[str, Tensor], layout: Layout) -> None:
    """Write this rank's shard from tensors of the right shapes."""
    tp, dim = layout.config.tp, rule.layout.shard_dim
    rows = parameter.shape[0] * (tp if dim == 0 else 1)
    full = rule.layout.join([None if name is None else parts[name] for name in rule.hf], tp, rows)
    parameter.copy_(full if dim is None else full.chunk(tp, dim=dim)[dist.get_rank(layout.tp_group)])
