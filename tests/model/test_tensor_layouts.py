"""How tensors are joined and split, against loops over heads and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_cord.model.tensor_layouts import Column, GateUp, Qkv, Replicated, Row, Vocabulary

SIZES = st.integers(1, 4)
REPEATABLE = settings(max_examples=30, derandomize=True, deadline=None)


def numbered(*shape: int, start: int = 0) -> Tensor:
    """Every element is another one."""
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


@REPEATABLE
@given(tp=SIZES, groups_per_rank=SIZES, ratio=SIZES, head_dim=SIZES, columns=st.integers(0, 3))
def test_qkv(tp: int, groups_per_rank: int, ratio: int, head_dim: int, columns: int) -> None:
    """Catches heads on the wrong rank or in the wrong order, in weights and biases, and a split that is no inverse."""
    groups = tp * groups_per_rank
    rest = (columns,) if columns else ()
    layout = Qkv(groups * ratio, groups, head_dim)
    tensors = [
        numbered(heads * head_dim, *rest, start=1000 * i)
        for i, heads in enumerate((groups * ratio, groups, groups), start=1)
    ]
    full = layout.join(tensors, tp, 0)
    query, key, value = (tensor.reshape(-1, head_dim, *rest) for tensor in tensors)
    for rank, shard in enumerate(full.chunk(tp)):
        wanted = []
        for group in range(rank * groups_per_rank, (rank + 1) * groups_per_rank):
            wanted += [query[group * ratio + i] for i in range(ratio)] + [key[group], value[group]]
        assert torch.equal(shard, torch.cat(wanted))
    assert all(torch.equal(a, b) for a, b in zip(layout.split(full, tp), tensors, strict=True))


@REPEATABLE
@given(heads=SIZES, head_dim=SIZES)
def test_qkv_without_a_key_bias(heads: int, head_dim: int) -> None:
    """Catches a missing part that is not zero, or that displaces its neighbours."""
    layout = Qkv(heads, heads, head_dim)
    query, value = numbered(heads * head_dim, start=1), numbered(heads * head_dim, start=1000)
    full = layout.join([query, None, value], 1, 0)
    parted = layout.split(full, 1)
    assert torch.equal(parted[0], query) and torch.equal(parted[2], value) and not parted[1].any()


@REPEATABLE
@given(tp=SIZES, rows=SIZES, columns=SIZES)
def test_gate_and_up(tp: int, rows: int, columns: int) -> None:
    """Catches a rank that gets all of the gate and none of the up projection, which plain stacking would give."""
    gate, up = numbered(tp * rows, columns), numbered(tp * rows, columns, start=1000)
    full = GateUp().join([gate, up], tp, 0)
    for rank, shard in enumerate(full.chunk(tp)):
        mine = slice(rank * rows, (rank + 1) * rows)
        assert torch.equal(shard, torch.cat([gate[mine], up[mine]]))
    assert all(torch.equal(a, b) for a, b in zip(GateUp().split(full, tp), [gate, up], strict=True))


@REPEATABLE
@given(vocab=st.integers(1, 9), padding=st.integers(0, 3), columns=SIZES)
def test_vocabulary(vocab: int, padding: int, columns: int) -> None:
    """Catches padding rows that are not zero or that leave with the tensor."""
    layout = Vocabulary(vocab)
    tensor = numbered(vocab, columns, start=1)
    full = layout.join([tensor], 1, vocab + padding)
    assert full.shape == (vocab + padding, columns) and not full[vocab:].any()
    assert torch.equal(layout.split(full, 1)[0], tensor)


@pytest.mark.parametrize(("layout", "dim"), [(Replicated(), None), (Column(), 0), (Row(), 1)])
def test_single_tensors(layout: Replicated | Column | Row, dim: int | None) -> None:
    """Catches a plain tensor that is changed, or split along the other dimension."""
    tensor = numbered(4, 6)
    assert layout.shard_dim == dim
    assert layout.join([tensor], 2, 4) is tensor and layout.split(tensor, 2)[0] is tensor
