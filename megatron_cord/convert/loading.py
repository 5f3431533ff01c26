"""Reads Hugging Face files straight into a rank's shards: only the rows that the rank keeps, and no second copy.

Blocks are given in the coordinates of the whole Megatron tensor, as a single rank would hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.convert.audit import Audit, check_problems
from megatron_cord.convert.hf.reader import StoredTensor, stored_tensors
from megatron_cord.convert.hf.spelling import published
from megatron_cord.convert.names import global_parameters
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorRule
from megatron_cord.parallel.objects import all_gather_json

#: what makes one Megatron tensor: its rule, and where each part lies, by published name
Source = tuple[TensorRule, dict[str, StoredTensor]]


def find_sources(model: LALM, stored: Sequence[StoredTensor]) -> dict[str, Source]:
    """Return where this rank's parameters lie, by their name in the whole model. Collective over all ranks.

    Raises:
        CordError: missing, unexpected, duplicated or misshapen tensors, those of all stages listed at once, on every
            rank.
    """
    audit = Audit(model)
    sources: dict[str, Source] = {}
    for name, tensor in published(model.arch, stored):
        rule = audit.admit(tensor.name, name, tensor.shape)
        if rule is not None:
            sources.setdefault(rule.megatron, (rule, {}))[1][name] = tensor
    check_problems([problem for share in all_gather_json(audit.problems()) for problem in share])
    return sources


def read_block(source: Source, rows: int, start: Sequence[int], out: Tensor) -> None:
    """Fill out with a block of a Megatron tensor.

    Args:
        source: of the tensor.
        rows: of the whole tensor, padding included.
        start: the block's first row, and its first column if it has columns.
        out: the block.

    Raises:
        CordError: a file ends too early.
    """
    rule, parts = source
    column = start[1] if len(start) > 1 else 0
    first, last, above = start[0], start[0] + len(out), 0
    for piece in rule.layout.pieces(rows):
        low, high = max(first, above), min(last, above + piece.stop - piece.start)
        if low < high:
            target, name = out[low - first : high - first], None if piece.part is None else rule.hf[piece.part]
            if name is None:
                target.zero_()
            else:
                parts[name].read_block(piece.start + low - above, column, target)
        above += piece.stop - piece.start


@torch.no_grad()
def read_into(model: LALM, checkpoint_dir: str | Path) -> None:
    """Fill this rank's part of the model from a Hugging Face directory. Collective; each rank reads its own share.

    Raises:
        CordError: the files are damaged or pickled, or their tensors do not fit; nothing is read then.
    """
    sources = find_sources(model, stored_tensors(checkpoint_dir))
    for name, parameter in global_parameters(model).items():
        for rows, start, out in _blocks(model, sources[name][0], parameter):
            read_block(sources[name], rows, start, out)


def _blocks(model: LALM, rule: TensorRule, parameter: Tensor) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """Yield the blocks of a shard: rows of the whole tensor, the block's start in it, and its part of the shard."""
    tp, rank, dim = model.layout.config.tp, dist.get_rank(model.layout.tp_group), rule.layout.shard_dim
    rows = parameter.shape[0] * (tp if dim == 0 else 1)
    column = rank * parameter.shape[1] if dim == 1 else 0
    done = 0
    for first, last in rule.layout.ranges(rows, tp, rank):
        yield rows, (first, column), parameter.data[done : done + last - first]
        done += last - first
