"""What ranks agree on between two steps: a signal to one rank, or the clock of one rank, is enough for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_cord.parallel.transfers import to_device


def any_rank(holds: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each of several things whether it holds on any rank; the same on every rank. Collective over all."""
    flags = to_device(torch.tensor([float(each) for each in holds]), device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
