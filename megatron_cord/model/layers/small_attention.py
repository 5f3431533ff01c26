"""Attention of short 16-bit sequences on a CPU as plain matrix products in fp32, a key–value group's heads together.

torch's kernel for CPUs is made for long sequences: on fifty to a hundred tokens in bfloat16 its backward pass takes
several times as long as the products need, as does one query of many keys, and it needs keys and values repeated for
every query head. The scores of so few tokens may exist.

Legend: S queries, K keys, B sequences, Q query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONGEST = 128  #: queries and keys; beyond, torch's kernel is as fast and keeps no scores


def is_small(query: Tensor, queries: int, keys: int) -> bool:
    """Return whether so few queries and keys, of the query's type and device, are faster this way."""
    return query.device.type == "cpu" and query.dtype.itemsize == 2 and max(queries, keys) <= LONGEST


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale · Q Kᵀ) V as [S, B, Q, D], in the type of the query.

    Args:
        query: [S, B, Q, D].
        key: [K, B, G, D].
        value: as key.
        is_causal: whether query i attends to keys up to i alone, S = K.
        mask: bool [B or 1, 1, S, K], where a key is attended to; None: everywhere. A query without a key gets a mean of
            values, not NaN.
        scale: of the scores; None: 1/√D.
    """
    (queries, size, heads, width), (keys, _, groups, _) = query.shape, key.shape
    shared = heads // groups
    dtype = torch.promote_types(query.dtype, torch.float32)

    def copied(x: Tensor) -> Tensor:
        return x.to(dtype, memory_format=torch.contiguous_format)

    q = copied(query.view(queries, size, groups, shared, width).permute(1, 2, 3, 0, 4))
    k, v = (copied(x.permute(1, 2, 0, 3)).reshape(size * groups, keys, width) for x in (key, value))
    if is_causal:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril_()
    bias = q.new_zeros(1)  # added by the product itself
    if mask is not None:
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(dtype).min)
        several = groups if len(mask) > 1 else 1
        bias = bias[:, :, None].expand(-1, several, shared, -1, -1).reshape(-1, shared * queries, keys)
    scores = torch.baddbmm(
        bias,
        q.reshape(size * groups, shared * queries, width),
        k.transpose(1, 2),
        alpha=1 / math.sqrt(width) if scale is None else scale,
    )
    out = torch.bmm(scores.softmax(-1), v).view(size, heads, queries, width)
    return out.to(query.dtype).permute(2, 0, 1, 3)
