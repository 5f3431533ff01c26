"""Tensors between Hugging Face's names and shapes and the sharded Megatron model, one Megatron tensor at a time, in both directions.

Memory: at most the parts of one fused tensor beside the model, whatever the size of the checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.families import family_of
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorMap, TensorRule
from megatron_cord.parallel.layout import Layout


def tensor_map_of(model: LALM) -> TensorMap:
    """All tensors of the model's architecture, over all pipeline stages."""
    return family_of(model.arch).tensor_map(model.arch)


def global_parameters(model: LALM) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under the names they have in the whole model: layers are numbered over all pipeline stages.

    With tied embeddings, the last stage's copy has the name of the first stage's original.
    """
    return {rename_to_global(model, name): parameter for name, parameter in model.named_parameters()}


#: A norm that is part of the matrix behind it, as transformer-engine's layers have them, and the norm that stands alone in the tables.
_FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def rename_to_global(model: LALM, name: str) -> str:
    """The name in the whole model of this rank's parameter."""
    for fused, alone in _FUSED_NORMS.items():
        name = name.replace(fused, alone)
    prefix = "language_model.decoder.layers."
    if name.startswith(prefix):
        number, rest = name.removeprefix(prefix).split(".", 1)
        offset = model.language_model.decoder.layers[0].layer_number - 1
        return f"{prefix}{int(number) + offset}.{rest}"
    if model.share_embeddings_and_output_weights and name == "language_model.output_layer.weight":
        return "language_model.embedding.word_embeddings.weight"
    return name


@torch.no_grad()
def export_tensors(
    model: LALM, select: Callable[[torch.nn.Parameter], bool] | None = None, *, in_pieces: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their published Hugging Face names, gathered over tensor-parallel ranks and pipeline stages.

    Collective: every rank of the model's tensor and pipeline groups must consume the whole iterator, and each gets every tensor.

    Args:
        model: any rank's part.
        select: which of this rank's parameters to export, e.g. those that are trained; all if None. Ranks that hold
            shards of one tensor must agree.
        in_pieces: spare a copy of what is part of a fused tensor and does not lie in one piece: it comes as a view with a dimension more,
            [pieces, rows of a piece, ...].

    Yields:
        (name, tensor) in the order of the family's table, on the model's device; the tensor may be a view of the parameter.
    """
    layout = model.layout
    mine = global_parameters(model)
    for rule in tensor_map_of(model).rules:
        parameter = mine.get(rule.megatron)
        if parameter is not None and select is not None and not select(parameter):
            parameter = None
        full = None if parameter is None else _gather(parameter.detach(), rule, layout)
        full = _from_owner(full, layout)
        if full is not None:
            parts = (rule.layout.views if in_pieces else rule.layout.split)(full, layout.config.tp)
            for name, tensor in zip(rule.hf, parts, strict=True):
                if name is not None:
                    yield name, tensor if tensor.dim() > full.dim() else tensor.contiguous()


def _gather(shard: Tensor, rule: TensorRule, layout: Layout) -> Tensor:
    """All tensor-parallel shards in one tensor."""
    dim = rule.layout.shard_dim
    if dim is None or layout.config.tp == 1:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(layout.config.tp)]
    dist.all_gather(shards, shard.contiguous(), group=layout.tp_group)
    return torch.cat(shards, dim=dim)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _from_owner(full: Tensor | None, layout: Layout) -> Tensor | None:
    """The tensor of the first stage that holds it, on every stage; None if no stage does."""
    if layout.config.pp == 1:
        return full
    header = torch.zeros(8, dtype=torch.int64, device=layout.device)  # has it, dtype, number of dimensions, sizes
    if full is not None:
        header[:3] = torch.tensor([1, _DTYPES.index(full.dtype), full.dim()])
        header[3 : 3 + full.dim()] = torch.tensor(full.shape)
    headers = [torch.empty_like(header) for _ in range(layout.config.pp)]
    dist.all_gather(headers, header, group=layout.pp_group)
    owners = [stage for stage, h in enumerate(headers) if h[0]]
    if not owners:
        return None
    _, dtype, dims, *sizes = headers[owners[0]].tolist()
    if full is None or layout.pp_rank != owners[0]:
        full = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=layout.device)
    full = full.contiguous()
    dist.broadcast(full, dist.get_global_rank(layout.pp_group, owners[0]), group=layout.pp_group)
    return full


@torch.no_grad()
def import_tensors(model: LALM, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fills this rank's part of the model from full tensors in any order. Not collective: each rank reads for itself.

    Args:
        model: any rank's part.
        tensors: (name, tensor) under Hugging Face names, in any transformers version's spelling.

    Raises:
        CordError: missing, unexpected, duplicated or misshapen tensors, all listed at once.
    """
    audit = Audit(model)
    waiting: dict[str, dict[str, Tensor]] = {}
    for spelled, tensor in tensors:
        admitted = audit.admit(spelled, tensor.shape)
        if admitted is None:
            continue
        name, rule = admitted
        parts = waiting.setdefault(rule.megatron, {})
        parts[name] = tensor
        if len(parts) == len(rule.hf_names):
            _fill(audit.mine[rule.megatron], rule, waiting.pop(rule.megatron), model.layout)
    check_problems(audit.problems())


class Audit:
    """Compares a stream of names and shapes with what this rank's part of the model is made of.

    Attributes:
        mine: this rank's parameters, as `global_parameters`.
    """

    def __init__(self, model: LALM) -> None:
        self.mine = global_parameters(model)
        self._layout = model.layout
        self._table, self._canonical = tensor_map_of(model), family_of(model.arch).canonical_name
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._kin: dict[tuple[str, ...], list[str]] = {}  # expected names by how they end, and by their numbers

    def admit(self, spelled: str, shape: Sequence[int]) -> tuple[str, TensorRule] | None:
        """The published name and the rule of a tensor that this rank needs; None if it is another stage's, or a problem."""
        name = self._canonical(spelled)
        rule = self._table.by_hf_name.get(name)
        if rule is None:
            nearest = self._nearest(name)
            self._problems.append(
                f"unexpected tensor {spelled}" + (f" (nearest expected: {nearest})" if nearest else "")
            )
            return None
        if name in self._seen:
            self._problems.append(f"tensor {spelled} occurs twice")
            return None
        self._seen.add(name)
        if rule.megatron not in self.mine:
            return None
        wanted = hf_shapes(self.mine[rule.megatron], rule, self._layout)[name]
        if tuple(shape) != tuple(wanted):
            self._problems.append(f"tensor {spelled} has shape {list(shape)}, expected {list(wanted)}")
            return None
        return name, rule

    def _nearest(self, name: str) -> str | None:
        """The most similar expected name. All of them are compared only if none ends alike and none is of the same layer: names by the
        thousand, as in a checkpoint under another prefix, would take minutes otherwise.
        """
        if not self._kin:
            for expected in self._table.by_hf_name:
                for trait in (_ending(expected), _numbers(expected)):
                    self._kin.setdefault(trait, []).append(expected)
        candidates = self._kin.get(_ending(name)) or self._kin.get(_numbers(name)) or list(self._table.by_hf_name)
        found = difflib.get_close_matches(name, candidates, n=1)
        return found[0] if found else None

    def problems(self) -> list[str]:
        """What does not fit, when all tensors have been admitted."""
        return [
            *self._problems,
            *(f"missing tensor {name}" for name in self._table.by_hf_name if name not in self._seen),
        ]


def _ending(name: str) -> tuple[str, ...]:
    return ("ends with", *name.split(".")[-2:])


def _numbers(name: str) -> tuple[str, ...]:
    return ("numbers", *(part for part in name.split(".") if part.isdecimal()))


def check_problems(problems: Iterable[str]) -> None:
    """Raises CordError with all problems of one or several audits, each once, if there are any."""
    once = list(dict.fromkeys(problems))
    if once:
        raise CordError(
            f"the checkpoint does not fit the model's architecture ({len(once)} problems): " + "; ".join(once)
        )


def hf_shapes(parameter: Tensor, rule: TensorRule, layout: Layout) -> dict[str, torch.Size]:
    """The shapes of the Hugging Face tensors that make this rank's shard."""
    shape = list(parameter.shape)
    if rule.layout.shard_dim is not None:
        shape[rule.layout.shard_dim] *= layout.config.tp
    parts = rule.layout.split(torch.empty(shape, device="meta"), layout.config.tp)
    return {name: part.shape for name, part in zip(rule.hf, parts, strict=True) if name is not None}


def _fill(parameter: Tensor, rule: TensorRule, parts: dict[str, Tensor], layout: Layout) -> None:
    """Writes this rank's shard from tensors of the right shapes."""
    tp, dim = layout.config.tp, rule.layout.shard_dim
    rows = parameter.shape[0] * (tp if dim == 0 else 1)
    full = rule.layout.join([None if name is None else parts[name] for name in rule.hf], tp, rows)
    parameter.copy_(full if dim is None else full.chunk(tp, dim=dim)[dist.get_rank(layout.tp_group)])
