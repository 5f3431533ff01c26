"""Rows of several clips one after the other: [T, H], clip i has lengths[i] of the T rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_rows(packed: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Return the first kept[i] rows of each clip, [sum of kept, H]."""
    if list(lengths) == list(kept):
        return packed
    return torch.cat([clip[:count] for clip, count in zip(torch.split(packed, list(lengths)), kept, strict=True)])
